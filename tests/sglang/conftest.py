"""Real servers; one is started once and shared by all tests that do not end it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.rollout.sglang.server import ServerSpec, SglangServer
from tests.sglang import models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="session")
def spec(model_path):
    return ServerSpec(
        python=ROOT / ".venv-sglang" / "bin" / "python",
        model_path=model_path,
        log=model_path.with_name("server.log"),
        arguments={"dtype": "float32", "max_total_tokens": 32768, "api_key": "secret"},
        environment={"OMP_NUM_THREADS": "1"},
        cpu=True,
        ready_seconds=240,
    )


@pytest.fixture(scope="session")
def server(spec):
    server = SglangServer(spec)
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def pair(spec):
    """Two servers, not started, for the tests that end them."""
    return [SglangServer(replace(spec, log=spec.log.with_name(f"server{n}.log"))) for n in range(2)]
