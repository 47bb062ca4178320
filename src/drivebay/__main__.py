"""`python -m drivebay` is `drivebay`."""

import sys

from drivebay.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
