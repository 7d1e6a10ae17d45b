"""Prints the complete configuration, and notes about it on stderr; exit code 2 if it is not valid.

fipo config examples/configs/fipo_qwen2.5_32b.yaml rollout.max_response_tokens=16384
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from fipo_megatron.config.checks import notices
from fipo_megatron.config.files import ConfigError, as_dict, load_config


def main(arguments: Sequence[str]) -> int:
    """Loads a configuration and prints it; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        config = load_config(arguments[0], arguments[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(yaml.safe_dump(as_dict(config), sort_keys=False), end="")
    for notice in notices(config):
        print(f"note: {notice}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
