"""A verifier that accepts half of the responses of a model with random weights."""

import zlib


def by_chance(response, ground_truth):
    return zlib.crc32((response + ground_truth).encode()) % 2 == 0
