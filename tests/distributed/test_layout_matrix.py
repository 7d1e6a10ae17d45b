"""One gradient for every layout: the actor under each parallelism against transformers, a loop and plain torch.

Each world size is one job that goes through its layouts; the tests below read what it measured.
"""

import json

import pytest

from tests.distributed.launch import on_ranks
from tests.distributed.mutations import SHOWS_IN

WORKER = "tests.distributed.layout_matrix_worker"
BOUNDS = {
    "log_probs": 1e-5,  # absolute
    "loss": 1e-5,
    "gradient": 1e-5,  # relative L2 of the worst tensor
    "grad_norm": 1e-5,
    "update_adam": 1e-3,  # relative L2 of the change of all weights in 3 steps at lr 1e-3
    "update_sgd": 1e-5,  # in one step
}


# bfloat16 weights and activations against the same float32 reference. The change of the weights is not compared: where
# a gradient is small, rounding decides the direction of Adam's step.
BOUNDS_BF16 = {"log_probs": 0.15, "loss": 0.01, "gradient": 0.1, "grad_norm": 0.02}


@pytest.fixture(scope="module", params=[1, 2, 4])
def cases(request, references, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrix") / "results.json"
    on_ranks(WORKER, request.param, str(out), references=references)
    return json.loads(out.read_text())


@pytest.mark.distributed
def test_every_layout_equals_the_reference(cases):
    assert cases
    for case in cases:
        where = f"{case['layout']}, {case['architecture']}: {case}"
        assert case["micro_batches"] >= 4, where
        assert case["dropped"] == 1, where
        assert case["denominator"] == 0, where
        assert case["shift"] == pytest.approx([1.5, 1.5], abs=0.05), where  # of the dropped response, on every rank
        assert case["noise_floor"] == [0.0, 0.0], where
        assert case["carry"] > 0.05, where
        for name, bound in (BOUNDS_BF16 if "bf16" in case["layout"] else BOUNDS).items():
            if name == "update_sgd" and "distributed optimizer" in case["layout"]:
                continue  # Megatron's knows Adam only
            assert case[name] <= bound, f"{name} in {where}"


@pytest.mark.distributed
@pytest.mark.parametrize("fault", SHOWS_IN)
def test_faults_are_noticed(fault, references, tmp_path):
    out = tmp_path / "results.json"
    on_ranks(WORKER, 2, str(out), fault, references=references)
    (case,) = json.loads(out.read_text())
    assert case["log_probs"] <= BOUNDS["log_probs"], "only the loss is at fault"
    assert case["gradient"] > 100 * BOUNDS["gradient"]
