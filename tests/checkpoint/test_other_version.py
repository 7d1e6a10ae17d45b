"""A run goes on with another version of Megatron-Core, and back: weights, optimizer, schedule and position are equal.

``FIPO_OTHER_PYTHON`` names the Python of an environment with the other version, made by ``make setup
PYTHON=python3.12 VENV=.venv-3.12`` for example. Either version may run the tests.
"""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from examples.quickstart import task
from fipo_megatron.actor.cpu_backend import MEGATRON_VERSIONS
from tests.processes import ROOT
from tests.runs import arguments
from tests.sglang import models

OTHER = os.environ.get("FIPO_OTHER_PYTHON")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.processes,
    pytest.mark.skipif(OTHER is None, reason="FIPO_OTHER_PYTHON: no Python with the other megatron-core is given"),
]
SCHEDULE = ["actor.optimizer.warmup_steps=3", "actor.optimizer.decay_steps=12", "actor.optimizer.weight_decay=0.1"]
BFLOAT16 = ["actor.dtype=bfloat16", "actor.distributed_optimizer=true", "actor.max_noise_shift=0.1"]
CASES = {
    "float32": [],
    "bfloat16": ["actor.dtype=bfloat16", "actor.max_noise_shift=0.1"],
    "bfloat16, distributed optimizer": BFLOAT16,
    "bfloat16, distributed optimizer, dp_reshardable": [*BFLOAT16, "checkpoint.optimizer_sharding=dp_reshardable"],
    "TP2": [*BFLOAT16, "actor.parallel.tensor_parallel=2"],
    "mixture of experts, EP2": [*BFLOAT16, "actor.parallel.expert_parallel=2"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    models.save(directory / "mixture", "qwen3 moe")
    return directory


def go_on(python, steps, ranks, results, words):
    """Trains until ``steps`` steps are taken; returns for each rank what it hashed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [python, *launcher, "-m", "tests.checkpoint.other_version_worker", results, *words, f"run.steps={steps}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [json.loads((results.parent / f"{results.name}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_the_other_version_and_back(case, data, tmp_path):
    overrides = [*SCHEDULE, *CASES[case]]
    if case.startswith("mixture"):
        overrides += [f"model.path={data}/mixture", "data.chat_template=none"]
    words = arguments(data, tmp_path / "run", *overrides)
    ranks = 2 if "2" in case.rpartition(" ")[2] else 1
    parts = [
        go_on(python, steps, ranks, tmp_path / f"hashes-{steps}", words)
        for steps, python in ((2, sys.executable), (4, OTHER), (6, sys.executable))
    ]
    own, other, own_again = ({each["version"] for each in part} for part in parts)
    assert own == own_again
    assert own | other == set(MEGATRON_VERSIONS)
    for before, after in itertools.pairwise(parts):
        for saved, resumed in zip(before, after, strict=True):
            assert resumed["opened"] == saved["trained"]
            assert resumed["opened"] != resumed["trained"]
    names = {part for name in parts[0][0]["opened"] if name.startswith("optimizer.") for part in re.split("[. ]", name)}
    assert names >= {"exp_avg", "exp_avg_sq"}
    assert case == "float32" or names & {"param", "fp32_param"}
