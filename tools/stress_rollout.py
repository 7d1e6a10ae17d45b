"""``python -m tools.stress_rollout``: the same as ``fipo stress``."""

import sys

from fipo_megatron.stress.stress_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
