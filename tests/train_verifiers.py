"""Verifiers that accept half of the responses of a model with random weights, and fail on others."""

import os
import zlib
from pathlib import Path


def by_chance(response, ground_truth):
    return zlib.crc32((response + ground_truth).encode()) % 2 == 0


def by_chance_or_fails(response, ground_truth):
    """Fails on 30 % of the responses; the verdicts on the others are those of :func:`by_chance`."""
    if zlib.crc32(response.encode()) % 10 < 3:
        raise RuntimeError("the database is down")
    return by_chance(response, ground_truth)


def by_chance_unless_broken(response, ground_truth):
    """Fails while the home directory holds a file named ``broken``."""
    if Path(os.environ["HOME"], "broken").exists():
        raise RuntimeError("the database is down")
    return by_chance(response, ground_truth)


def rarely(response, ground_truth):
    """Accepts one of 14 responses."""
    return zlib.crc32((response + ground_truth).encode()) % 14 == 0
