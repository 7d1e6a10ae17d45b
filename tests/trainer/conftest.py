"""Data and finished runs that several tests compare with; no test changes them."""

import pytest

from examples.quickstart import task
from tests.runs import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The problems of the quickstart, and its model with random weights."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def recorded(data, tmp_path_factory):
    """Five steps on one rank, with a rollout dump and checkpoints of the steps 2, 4 and 5."""
    output = tmp_path_factory.mktemp("runs") / "recorded"
    train(data, output, "run.record_rollouts=true", "checkpoint.save_every=2")
    return output
