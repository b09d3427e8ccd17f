"""`python -m diffcourse` is the command line; nbdev exports no file of this name, so it is written by hand."""

import sys

from diffcourse.cli import main

if __name__ == "__main__":
    sys.exit(main())
