"""`python -m bilevel`: the command line."""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    sys.exit(main())
