"""Mutants of the algorithm, each of which the comparison with the loop must catch.

The package ``algorithm`` is copied, one line of it is changed, and the copy has to fail where the original passes: this
is how we know that the comparison looks at the normaliser, the carries and the drop at all.
"""

import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fipo_megatron.algorithm
from fipo_megatron.algorithm.policy_loss import loss_config
from tests.algorithm.partitions import PACKAGE, assert_split_matches, random_batch

SOURCE = Path(fipo_megatron.algorithm.__file__).parent
TOKEN_MEAN = loss_config("fipo", dual_clip=3.0, safety_threshold=2.0, weight_clip=None)
SEQUENCE_MEAN = loss_config("grpo", kl_coef=0.0)

MUTANTS = {
    "normaliser: denominator counts dropped tokens": (
        "policy_loss.py",
        "return loss_T.sum(), kept_T.sum()",
        "return loss_T.sum(), inputs.mask.sum()",
    ),
    "normaliser: mean over the rank's own tokens": (
        "policy_loss.py",
        "return loss_T.sum(), kept_T.sum()",
        "return loss_T.sum() / kept_T.sum().clamp(min=1), kept_T.any().long()",
    ),
    "normaliser: sequences counted on every rank": (
        "future_kl.py",
        "flags_S.sum() * (self.rank == 0)",
        "flags_S.sum()",
    ),
    "carry: none": ("future_kl.py", "carry_T = carries_SK.flatten()", "carry_T = 0 * carries_SK.flatten()"),
    "carry: from the next chunk only": ("future_kl.py", "+ decay_S * carries_S[-1])", "+ 0 * carries_S[-1])"),
    "carry: one token too near": ("future_kl.py", "distance_T = end_T - torch", "distance_T = end_T - 1 - torch"),
    "carry: chunks in the order held, not in time": (
        "future_kl.py",
        "in shards.owners[:0:-1]:",
        "in sorted(shards.owners)[:0:-1]:",
    ),
    "scan: across the join of two chunks": (
        "future_kl.py",
        "discount(half_life), ends - 1)",
        "discount(half_life), ends[-1:] - 1)",
    ),
    "drop: each rank by its own count": (
        "policy_loss.py",
        "gathered[:, :, :2].sum(0).unbind(1)",
        "gathered[shards.rank, :, :2].unbind(1)",
    ),
    "drop: at the threshold": (
        "policy_loss.py",
        "dual_clipped_S > config.sequence_drop_threshold",
        "dual_clipped_S >= config.sequence_drop_threshold",
    ),
    "filter: keeps the sign, drops the small": (
        "policy_loss.py",
        "torch.where(values_T > math.log(config.dual_clip)",
        "torch.where(values_T < math.log(config.dual_clip)",
    ),
    "surrogate: ratio clamped": (
        "policy_loss.py",
        "plain_T = -advantages_T * ratio_T",
        "plain_T = -advantages_T * ratio_T.clamp(max=2.0)",
    ),
}


def load_copy(folder, name, file=None, old="", new=""):
    """Imports a copy of the package with one replacement made."""
    package = folder / name
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if file:
        text = (package / file).read_text()
        assert text.count(old) == 1, f"the mutant no longer applies: {old!r} in {file}"
        (package / file).write_text(text.replace(old, new))
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        loss, scan = (importlib.import_module(f"{name}.{module}") for module in ("policy_loss", "future_kl"))
    finally:
        sys.path.remove(str(folder))
    return SimpleNamespace(LossInputs=loss.LossInputs, SequenceShards=scan.SequenceShards, policy_loss=loss.policy_loss)


def check(algorithm):
    for seed in range(6):
        batch = random_batch(seed)
        for config in (TOKEN_MEAN, SEQUENCE_MEAN):
            assert_split_matches(algorithm, batch, config, cp=2, dp=2, budget=112)
            assert_split_matches(algorithm, batch, config, cp=4)


def test_the_package_and_an_unchanged_copy_pass(tmp_path):
    check(PACKAGE)
    check(load_copy(tmp_path, "mutant_none"))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    mutant = load_copy(tmp_path, f"mutant_{list(MUTANTS).index(name)}", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check(mutant)
