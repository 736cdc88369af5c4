"""`python -m resnet_bk` is the command `resnet-bk`."""

import sys

from resnet_bk.cli import main

if __name__ == "__main__":
    sys.exit(main())
