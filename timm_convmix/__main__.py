"""``python -m timm_convmix``: the same as the command ``timm-convmix``."""

import sys

from timm_convmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
