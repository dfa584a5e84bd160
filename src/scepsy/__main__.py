"""`python -m scepsy` is the command line."""

import sys

from scepsy.cli import main

if __name__ == "__main__":
    sys.exit(main())
