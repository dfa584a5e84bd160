"""Reports on traces: tables for a terminal, JSON for programs, one self-contained page for a browser."""
