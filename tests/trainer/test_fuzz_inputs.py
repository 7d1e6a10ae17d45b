"""Seeded mutations of every small file of a model directory and of a data file: told in lines, or accepted."""

import json
import os
import random
import shutil
import time

import pytest

from fipo_megatron.config import load_config
from fipo_megatron.trainer.training_inputs import read_training_inputs
from tests.runs import arguments

MUTATIONS = int(os.environ.get("FIPO_FUZZ_INPUTS", "500"))
SECONDS = 20.0
VALUES = (
    None,
    True,
    0,
    -1,
    3,
    2**70,
    1e300,
    0.5,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [1],
    ["x"],
    [[]],
    {},
    {"x": 1},
    {"id": 5},
)
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "problems.jsonl",
)


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """A model directory with an index, beside a data file of twenty rows."""
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(data / "model", directory)
    rows = (data / "problems.jsonl").read_text().splitlines(keepends=True)[:20]
    (directory / "problems.jsonl").write_text("".join(rows))
    size = int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((directory / "model.safetensors").read_bytes()[8 : 8 + size])
    names = {name: "model.safetensors" for name in header if name != "__metadata__"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return directory


def mutate(name: str, content: bytes, rng: random.Random) -> bytes | None:
    """Returns a mutation of a file; None removes the file."""
    kind = rng.choice(("flip", "flip", "truncate", "add", "add", "type", "type", "type", "key", "delete"))
    reach = min(len(content), 4096) if name.endswith(".safetensors") else len(content)
    position = rng.randrange(reach)
    if kind == "flip":
        return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]
    if kind == "truncate":
        return content[:position]
    if kind == "delete":
        return None if rng.random() < 0.3 else b""
    if kind == "add" or not name.endswith((".json", ".jsonl")):
        added = rng.choice(
            (rng.randbytes(3), b"\0", b"\xff", b'"', b"{", b"[" * 5000, b"{{ x", b"{% for a in 5 %}", b"\n")
        )
        return content[:position] + added + content[position:]
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in content.splitlines()]
        change(rows[rng.randrange(len(rows))], rng, kind)
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    tree = json.loads(content)
    change(tree, rng, kind)
    return json.dumps(tree).encode()


def change(tree: dict | list, rng: random.Random, kind: str) -> None:
    """Replaces a value somewhere in the tree by one of another type, or removes it."""
    while True:
        key = rng.choice([*tree]) if isinstance(tree, dict) else rng.randrange(len(tree))
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.6:
            tree = tree[key]
            continue
        if kind == "key":
            del tree[key]
        else:
            tree[key] = rng.choice(VALUES)
        return


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mutated_input_is_accepted_or_told_in_lines(small, tmp_path):
    overrides = [f"model.path={small}", f"data.files=[{small}/problems.jsonl]"]
    path, *rest = arguments(small, tmp_path / "run", *overrides)
    config = load_config(path, rest)
    assert len(read_training_inputs(config).prompts) == 20
    originals = {name: (small / name).read_bytes() for name in FILES}
    rng, accepted = random.Random(1), 0
    for number in range(MUTATIONS):
        name = FILES[number % len(FILES)]
        mutated = mutate(name, originals[name], rng)
        if mutated is None:
            (small / name).unlink()
        else:
            (small / name).write_bytes(mutated)
        start, told = time.monotonic(), ""
        try:
            accepted += bool(read_training_inputs(config).prompts)
        except ValueError as error:
            told = str(error)
        except BaseException as error:
            (tmp_path / name).write_bytes(mutated or b"")
            raise AssertionError(f"mutation {number} of {name}, kept in {tmp_path}") from error
        finally:
            (small / name).write_bytes(originals[name])
        assert all(line.strip() and len(line) < 1000 for line in told.split("\n") if told), (number, name, told)
        assert "Traceback" not in told, (number, name)
        assert time.monotonic() - start < SECONDS, (number, name)
    assert 0 < accepted < MUTATIONS
    assert not (tmp_path / "run").exists()
    assert len(read_training_inputs(config).prompts) == 20
