"""Runs ``python -m fipo_megatron.convert megatron-to-hf``."""

import sys

from fipo_megatron.convert import main

if __name__ == "__main__":
    sys.exit(main(["megatron-to-hf", *sys.argv[1:]]))
