"""One Slurm for all tests, and a job that nothing interrupts, with which the others are compared."""

from __future__ import annotations

import os
import sys

import pytest

from examples.quickstart import task
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Job


def prepared(cluster, tmp_path_factory):
    """Returns a cluster whose jobs have this Python, directories of their own and no preflight."""
    cluster.environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FIPO_PREFLIGHT": "off",
        "FIPO_PYTHON": sys.executable,
        "REAL_PYTHON": sys.executable,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "TMPDIR": str(tmp_path_factory.mktemp("temporary")),
    }
    return cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    found = prepared(Cluster(tmp_path_factory.mktemp("slurm"), nodes=8), tmp_path_factory)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The problems of the quickstart, and its model with random weights."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def whole(cluster, data, tmp_path_factory):
    """A job with the embedded engine on two nodes, submitted at once; wait for it before looking at its output."""
    return Job.train(cluster, data, tmp_path_factory.mktemp("whole"))


def pytest_collection_modifyitems(items):
    for item in items:
        if os.geteuid() and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason="Slurm's daemons need root"))
