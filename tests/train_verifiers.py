"""A verifier that a model with random weights satisfies half of the time."""

import zlib


def by_chance(response, ground_truth):
    return zlib.crc32((response + ground_truth).encode()) % 2 == 0
