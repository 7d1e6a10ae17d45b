"""``fipo plan`` as a user runs it: tables, files, exit codes and errors."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fipo_megatron.plan import command
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

MODEL = "tests/weights/configs/Qwen2.5-0.5B.json"
PRESET = "examples/configs/fipo_qwen2.5_32b.yaml"
SETTINGS = {
    "model": {"path": MODEL},
    "data": {"files": ["prompts.jsonl"], "max_prompt_tokens": 512},
    "rollout": {"max_response_tokens": 3584, "prompts_per_step": 128},
    "reward": {"overlong_buffer_tokens": 512},
    "actor": {"token_budget": 4096, "parallel": {"tensor_parallel": 2, "sequence_parallel": True}},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


@pytest.mark.processes
def test_a_run_that_fits(config, tmp_path, capsys):
    out = tmp_path / "plan"
    assert command.main([config, "--gpus", "8", "--output", str(out)]) == command.FITS
    shown = capsys.readouterr()
    plan = json.loads((out / "plan.json").read_text())
    assert plan["fits"]
    assert plan["problems"] == []
    assert plan["cluster"] == {"trainer_gpus": 4, "rollout_gpus": 4, "gpus_per_node": 8}
    architecture = Architecture.from_hf(json.loads(Path(MODEL).read_text()))
    assert plan["weights"] == {
        "tensors": len(tables.hf_tensors(architecture)),
        "parameters": tables.parameter_count(architecture),
    }
    # Half of the parameters in bfloat16 on each tensor-parallel rank; norms are whole on both.
    parameters = plan["gpus"]["stage 0"]["update"]["parameters"]
    assert parameters == pytest.approx(tables.parameter_count(architecture), rel=1e-3)
    assert plan["gpus"]["stage 0"]["update"]["gradients"] == pytest.approx(2 * parameters, rel=1e-3)
    largest = max(sum(parts.values()) for parts in plan["gpus"]["stage 0"].values())
    assert f"Fits: at most {largest / 2**30:.1f} of 79.1 GiB." in shown.out
    assert plan["time"]["step_seconds"] > 0
    assert re.search(r"^step +[\d.,]+ +100%", shown.out, re.MULTILINE)
    assert "traced stage 0 of 1" in shown.err
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
def test_a_run_that_does_not_fit_and_the_changes_that_do(config, capsys):
    changed = ["actor.parallel.tensor_parallel=1", "actor.parallel.sequence_parallel=false"]
    arguments = [config, *changed, "--gpus", "4", "--gpu-memory", "9GiB", "rollout.sglang.mem_fraction_static=0.8"]
    assert command.main(arguments) == command.TOO_LARGE
    shown = capsys.readouterr().out
    assert re.search(r"Does not fit:\n  stage 0: update needs [\d.]+ GiB of 9.0 GiB\n", shown)
    proposals = shown.partition("Changes that fit\n")[2].splitlines()[2:]
    assert 1 <= len(proposals) <= 3
    first = re.fullmatch(r" *([\d.]+) +[\d,]+  (\S.*)", proposals[0])
    assert float(first[1]) <= 9.0
    assert command.main([*arguments, *first[2].split()]) == command.FITS
    assert f"at most {first[1]} of 9.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3", "rollout.engine=embedded"], "actor.parallel: tensor_parallel = 2 × pipeline_parallel"),
        (["rollout.max_respons_tokens=5"], "unknown key; did you mean rollout.max_response_tokens?"),
        (["actor.parallel.tensor_parallel=4"], "tensor_parallel = 4: must divide the model's attention heads, 14"),
        (["rollout.max_response_tokens=40000", "actor.token_budget=65536"], "must be at most the model's context"),
        (["model.path=/nowhere"], "model.path = /nowhere: there is no such directory"),
        (["--device", "h1000"], "device = h1000: must be one of h100"),
        (["--gpus", "2", "--rollout-gpus", "2"], "--rollout-gpus 2: must be below --gpus 2"),
        (["actor.fp8=hybrid", "--device", "a100-80"], "actor.fp8 = hybrid: needs FP8, which a100-80 does not have"),
        (["actor.fp8=hybrid", "--layers", "torch"], "actor.fp8 = hybrid: needs Transformer Engine's layers"),
        (["--kept-groups", "1.5"], "kept_fraction: must be in (0, 1], got 1.5"),
    ],
)
def test_errors_are_told_before_anything_is_built(config, arguments, message, capsys):
    assert command.main([config, *arguments]) == command.NOT_VALID
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out
    assert "Traceback" not in shown.err


def test_an_unknown_architecture_is_named(config, tmp_path, capsys):
    model = tmp_path / "config.json"
    model.write_text(json.dumps(json.loads(Path(MODEL).read_text()) | {"architectures": ["MambaForCausalLM"]}))
    assert command.main([config, f"model.path={model}"]) == command.NOT_VALID
    assert "MambaForCausalLM" in capsys.readouterr().err


def test_without_a_number_of_gpus_whole_nodes_are_taken(config):
    parser = command._parser()
    options = parser.parse_args([config, "actor.parallel.tensor_parallel=2", "actor.parallel.context_parallel=8"])
    request = command._request(options)
    assert (request.shape.trainer_gpus, request.shape.rollout_gpus) == (16, 8)
