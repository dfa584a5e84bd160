"""Hooks into agent frameworks: one module each, found through entry points."""
