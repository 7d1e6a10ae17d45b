"""``python -m tools.plan``: the same as ``fipo plan``."""

import sys

from fipo_megatron.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
