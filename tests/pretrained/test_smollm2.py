"""A real pretrained model through Megatron: it answers as before and comes back bit for bit."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from fipo_megatron.actor import parallel
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.sharded_checkpoint import load_weights
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import logits
from tests.pretrained import smollm2

pytestmark = pytest.mark.pretrained
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return smollm2.prepare()


def convert(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "megatron"
    convert("tools.convert_hf_to_megatron", model, target, "--verify")
    return target


def digests(path):
    """Returns the SHA-256 of the bytes of every tensor."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                found[name] = hashlib.sha256(tensors.get_tensor(name).numpy().tobytes()).hexdigest()
    return found


def test_megatron_says_paris(model, checkpoint):
    """Decodes greedily from the reloaded checkpoint, and compares the logits with those of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    architecture = Architecture.from_directory(model)
    layout = parallel.initialize(ParallelConfig(), seed=1, environment={})
    try:
        actor = ActorConfig(dtype="float32", transformer={"perform_initialization": False})
        chunks = build_model(architecture, actor, layout)
        load_weights(chunks, architecture, layout, checkpoint)
        prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"][0]
        ids = prompt
        with torch.no_grad():
            for _ in range(2):
                [found] = logits(chunks[0], [ids])
                ids = torch.cat([ids, found[-1:].argmax(-1)])
            theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
            [mine] = logits(chunks[0], [ids])
            torch.testing.assert_close(mine, theirs(ids[None]).logits[0], atol=1e-4, rtol=0)
            assert torch.equal(theirs.generate(prompt[None], max_new_tokens=2, do_sample=False)[0], ids)
    finally:
        parallel.destroy()
    assert tokenizer.decode(ids[len(prompt) :]) == " Paris."


def test_every_tensor_comes_back(model, checkpoint, tmp_path):
    target = tmp_path / "hf"
    text = convert("tools.convert_megatron_to_hf", checkpoint, target, "--verify")
    assert str(target) in text
    original = digests(model)
    assert len(original) == 272
    assert digests(target) == original
    assert json.loads((target / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer("Paris")["input_ids"] == transformers.AutoTokenizer.from_pretrained(model)("Paris")["input_ids"]
