"""`python -m tq_mcp`, the same as the command `tq-mcp`."""

import sys

from tq_mcp.cli import main

if __name__ == "__main__":
    sys.exit(main())
