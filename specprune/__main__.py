"""`python -m specprune` is the command line."""

import sys

from specprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
