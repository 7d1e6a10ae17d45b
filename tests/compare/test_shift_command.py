"""The command on the quickstart's model with random weights: all files, resuming, refusals and sources of responses."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fipo_megatron import cli
from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron
from fipo_megatron.compare.divergences import QUANTITIES
from tests.compare.results import check_page, models, rows, settings
from tests.processes import run_ranks
from tests.runs import CONFIG

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
FILES = ["report.html", "responses.jsonl", "settings.json", "summary.json", "tokens.jsonl"]


def arguments(data, output, *overrides):
    chosen = ["actor.token_budget=128", "evaluation.samples_per_prompt=3"]
    return ["compare", "shift", str(CONFIG), *models(data), *settings(data, output), *chosen, *overrides]


def compare(data, output, *overrides):
    return cli.main(arguments(data, output, *overrides))


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """The results of a comparison on fresh responses."""
    output = tmp_path_factory.mktemp("out")
    assert compare(data, output) == 0
    return output / "compare-changed"


def test_all_files_are_written(compared, capsys):
    assert sorted(file.name for file in compared.iterdir()) == FILES
    found = rows(compared / "tokens.jsonl")
    assert [row["response"] for row in found] == list(range(18))
    for row in found:
        assert {len(row[name]) for name in ("text", "token_ids", *QUANTITIES)} == {len(row["token_ids"])}
        assert all(0 <= js <= math.log(2) for js in row["js"])
    summary = json.loads((compared / "summary.json").read_text())
    js = [value for row in found for value in row["js"]]
    assert summary["positions"] == len(js)
    assert summary["quantities"]["js"]["mean"] == pytest.approx(sum(js) / len(js))
    assert summary["quantities"]["js"]["fractions"]["> 0.001"] == sum(v > 0.001 for v in js) / len(js)
    assert sum(summary["quantities"]["js"]["profile"]["positions"]) == len(js)
    check_page(compared / "report.html")


def test_an_interrupted_comparison_goes_on(data, compared, tmp_path):
    copy = tmp_path / "compare-changed"
    shutil.copytree(compared, copy)
    (copy / "summary.json").unlink()
    lines = (compared / "tokens.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "tokens.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:30])
    assert compare(data, tmp_path, "compare.temperature=0.5") == 2
    assert compare(data, tmp_path) == 0
    assert (copy / "tokens.jsonl").read_bytes().count(b"\n") == 18
    for one, other in zip(
        rows(compared / "tokens.jsonl"), rows(copy / "tokens.jsonl"), strict=True
    ):  # other micro-batches round differently
        assert one["js"] == pytest.approx(other["js"], abs=1e-6)


def test_a_finished_comparison_is_kept(data, compared, capsys):
    assert compare(data, compared.parent) == 2
    assert "already holds a comparison; choose another name with compare.name" in capsys.readouterr().err


def test_a_checkpoint_has_the_numbers_of_its_model(data, compared, tmp_path):
    hf_to_megatron(data / "changed", tmp_path / "checkpoint", Options())
    given = [f"compare.responses=[{compared}]", f"compare.rl={tmp_path}/checkpoint", "compare.name=changed"]
    assert compare(data, tmp_path, *given) == 0
    assert (tmp_path / "compare-changed" / "tokens.jsonl").read_bytes() == (compared / "tokens.jsonl").read_bytes()


def test_moments_reads_its_responses(compared, capsys):
    assert cli.main(["moments", str(compared), "--verifier", "exact"]) == 0
    assert "truncated responses: " in capsys.readouterr().out


def test_several_ranks_write_the_same_numbers(data, compared, tmp_path):
    """The second rank reads the same inputs, has only padding of the vocabulary, and writes nothing."""
    split = ["actor.parallel.tensor_parallel=2", "actor.vocab_multiple=512"]
    given = arguments(data, tmp_path, f"compare.responses=[{compared}]", *split)
    done = run_ranks("fipo_megatron.cli", given, ranks=2)
    assert done.code == 0, done.output[-4000:]
    for one, other in zip(
        rows(compared / "tokens.jsonl"), rows(tmp_path / "compare-changed" / "tokens.jsonl"), strict=True
    ):
        assert one["token_ids"] == other["token_ids"]
        assert one["delta"] == pytest.approx(other["delta"], abs=1e-5)


def test_several_ranks_do_not_sample(data, tmp_path, monkeypatch, capsys):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert compare(data, tmp_path) == 2
    assert "compare.responses: empty, with 2 ranks; name files with responses, or start one" in capsys.readouterr().err


def test_a_model_does_not_differ_from_itself(data, compared, tmp_path):
    assert compare(data, tmp_path, f"compare.responses=[{compared}]", f"compare.rl={data}/model") == 0
    for row in rows(tmp_path / "compare-model" / "tokens.jsonl"):
        assert not any(row[name][i] for name in ("js", "kl", "kl_reverse", "delta") for i in range(len(row["js"])))
        assert set(row["rank"]) == {1}
        assert set(row["overlap"]) == {1.0}
    assert "NaN" not in (tmp_path / "compare-model" / "summary.json").read_text()


def test_trajectory_files_of_a_run_are_read(data, tmp_path):
    """Text is tokenized again; a row whose text gives another number of tokens is left out."""
    written = [
        {
            "step": 0,
            "prompt": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
            "response": "1+1=2<|im_end|>",
            "response_tokens": tokens,
        }
        for tokens in (6, 7)
    ]
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "from-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    assert compare(data, tmp_path, f"compare.responses=[{tmp_path}]") == 0
    (row,) = rows(tmp_path / "compare-changed" / "tokens.jsonl")
    assert "".join(row["text"]) == "1+1=2<|im_end|>"
    summary = json.loads((tmp_path / "compare-changed" / "summary.json").read_text())
    assert summary["inexact_rows_left_out"] == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tokenizer.json", "<|im_start|>", "<|im_begin|>", "the tokenizers must be equal"),
        ("config.json", '"vocab_size": 284', '"vocab_size": 288', "has a vocabulary of 288 tokens"),
        ("tokenizer.json", '"individual_digits": true', '"individual_digits": false', "differs from that of"),
    ],
)
def test_another_vocabulary_is_named(data, tmp_path, capsys, file, old, new, message):
    other = tmp_path / "other"
    shutil.copytree(data / "model", other)
    text = (other / file).read_text()
    assert old in text
    (other / file).write_text(text.replace(old, new))
    if file == "config.json":
        weights = load_file(other / "model.safetensors")
        weights["model.embed_tokens.weight"] = torch.nn.functional.pad(
            weights["model.embed_tokens.weight"], (0, 0, 0, 4)
        )
        save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert compare(data, tmp_path, f"compare.rl={other}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('compare.base=""', "compare.base: missing; expected a Hugging Face directory"),
        ("compare.rl=/nowhere", "compare.rl = '/nowhere': has no config.json"),
        ("evaluation.files=[] run.evaluate_every=0", "name responses, or problems to answer"),
        ("compare.responses=[/nowhere]", "/nowhere: holds no responses"),
        (
            "compare.responses=[{compared}] data.max_prompt_tokens=8 actor.token_budget=28",
            "actor.token_budget = 28: must be at least ",
        ),
        ("compare.temperature=0", "compare.temperature"),
    ],
)
def test_mistakes_are_one_sentence(data, compared, tmp_path, capsys, override, message):
    assert compare(data, tmp_path, *override.format(compared=compared).split()) == 2
    assert message in capsys.readouterr().err


def test_the_command_names_its_kinds(capsys):
    assert cli.main(["compare", "--help"]) == 0
    assert "fipo compare shift CONFIG" in capsys.readouterr().out
    assert cli.main(["compare", "swop"]) == 2
    assert os.environ.get("RANK") is None
