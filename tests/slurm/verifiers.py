"""A verifier that a test can hold, so that a run stays in its step."""

import os
import time
from pathlib import Path

from tests.train_verifiers import by_chance


def by_chance_unless_held(response, ground_truth):
    """Waits while the home directory holds a file named ``hold``."""
    while Path(os.environ["HOME"], "hold").exists():
        time.sleep(0.1)
    return by_chance(response, ground_truth)
