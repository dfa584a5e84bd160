"""Scepsy's optimizer: pure values in, pure values out."""
