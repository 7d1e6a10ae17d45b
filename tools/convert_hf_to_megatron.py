"""Runs ``python -m fipo_megatron.convert hf-to-megatron``."""

import sys

from fipo_megatron.convert import main

if __name__ == "__main__":
    sys.exit(main(["hf-to-megatron", *sys.argv[1:]]))
