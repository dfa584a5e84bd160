"""Benchmarks: `python -m benchmarks.NAME` prints a table and, last, one JSON line; a missed bound exits with 1."""
