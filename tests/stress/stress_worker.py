"""Runs ``fipo stress`` on a forked rank."""

from __future__ import annotations

import warnings

from fipo_megatron import cli


def main(*arguments: str) -> int:
    warnings.simplefilter("ignore")
    return cli.main(["stress", *arguments])
