"""Runs that learn nothing any more end with an error, and export nothing."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.processes import ROOT, run_ranks
from tests.runs import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SFT = ["run.steps=9", "sft.examples_per_step=8", "actor.prompts_per_mini_batch=4", "sft.max_skipped_updates=3"]


def fine_tune(data, output, change):
    """Fine-tunes the model with one of its tensors changed, until the run ends with an error; returns what it says."""
    model = output.parent / "model"
    shutil.copytree(data / "model", model)
    tensors = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: change(tensors[name].clone())}, model / "model.safetensors", {"format": "pt"})
    inputs = [f"model.path={model}", f"data.files=[{data}/examples.jsonl]", f"run.output={output}"]
    config = ROOT / "examples" / "quickstart" / "sft.yaml"
    done = run_ranks("fipo_megatron.train", [str(config), *inputs, *SFT], ranks=None)
    assert done.code == 1, done.output
    assert "Traceback" not in done.output
    return done.output


def test_a_policy_that_has_lost_everything_raises_the_alarm(data, tmp_path):
    """From step 2 on no answer is right, so that no group is kept and no update is made."""
    run = tmp_path / "run"
    train(data, run, "run.steps=2")
    hopeless = ["reward.verifier=exact", "rollout.max_generation_batches=1", "run.steps=9"]
    said = train(data, run, *hopeless, code=3)
    assert "the run has collapsed: nothing was learned in the last 3 steps: no group was kept in 3 of them" in said
    assert "nothing to learn from in this step: 0 of 4 groups after 1 batches of prompts" in said
    assert [row.get("health/lost_steps") for row in metrics(run)] == [None, None, 1, 2, 3]
    [alarm] = [json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["step"], alarm["began"]) == (4, 0)
    said = train(data, run, *hopeless, "health.action=off", "rollout.max_empty_steps=2", code=1)
    assert "no group was kept in each of 2 steps (rollout.max_empty_steps = 2)" in said
    assert "is in the checkpoint of step 6; run it again to go on" in said


def test_weights_that_are_not_finite_are_refused(data, tmp_path):
    def one_nan(weight):
        weight[3, 5] = float("nan")
        return weight

    said = fine_tune(data, tmp_path / "run", one_nan)
    assert f"WeightsError: model.path = {tmp_path / 'model'}: 1 parameters hold NaN or infinity" in said


def test_fine_tuning_that_skips_every_update_ends(data, tmp_path):
    """The weights are finite and too large: every loss is NaN."""
    said = fine_tune(data, tmp_path / "run", lambda weight: weight * 1e38)
    assert "UpdatesSkippedError: 3 updates in a row were skipped (sft.max_skipped_updates = 3), the last one" in said
    assert [row["optimizer/skipped_updates"] for row in metrics(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "hf").exists()
