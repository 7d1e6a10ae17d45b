"""The quickstart's run with ``rollout.engine=sglang``: it starts a real server itself."""

import json
import subprocess
from pathlib import Path

import pytest

from examples.quickstart import task
from fipo_megatron.rollout.sglang import shared_memory
from tests.runs import train_by_command
from tests.sglang.conftest import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


def processes_of(text):
    """Returns the command lines of running processes that contain a text."""
    found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if text in line and not line.startswith("Z")]


@pytest.mark.parametrize(("sync", "ranks"), [("disk", 1), ("distributed", 1), ("distributed", 2)])
def test_a_run_with_a_server(sync, ranks, tmp_path):
    """With two ranks, torchrun's variables surround the server; a proxy that is dead surrounds it always."""
    task.build(tmp_path / "data", seed=1)
    before = {*shared_memory.DIRECTORY.iterdir()}
    train_by_command(
        tmp_path / "data",
        tmp_path / "run",
        *("rollout.engine=sglang", f"rollout.servers.sync={sync}", "run.steps=3"),
        f"rollout.servers.python={ROOT}/.venv-sglang/bin/python",
        "rollout.servers.max_probe_mean_shift=1e-4",
        "rollout.servers.max_probe_quantile_shift=1e-4",
        "rollout.sglang={max_total_tokens: 16384}",
        "rollout.servers.environment={OMP_NUM_THREADS: '1'}",
        ranks=ranks,
        environment=dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
        timeout=800,
    )
    rows = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["mismatch/abs_max"] < 1e-4 for row in rows)
    assert all(row["optimizer/updates"] == 2 and row["optimizer/grad_norm"] > 0 for row in rows)
    assert not processes_of(str(tmp_path)), "nothing is left running"
    assert not {*shared_memory.DIRECTORY.iterdir()} - before
