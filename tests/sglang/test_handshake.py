"""The handshake compares what a real server reports with the model to train."""

import json
import shutil

import pytest
import transformers

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.handshake import TESTED_VERSION, handshake
from tests.sglang import models
from tests.sglang.test_client import with_client

pytestmark = pytest.mark.sglang


def shake(server, path, **changes):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    options = {"longest": 1000} | changes
    return with_client(server, lambda client: handshake(client, path, tokenizer, **options))


def test_the_model_that_is_trained(server, model_path):
    [facts] = shake(server, model_path)
    assert (facts.url, facts.version, facts.dtype, facts.ranks) == (server.url, TESTED_VERSION, "float32", 1)
    assert 1000 <= facts.context <= models.CONTEXT


def test_another_model_version_or_length(server, model_path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    )
    with pytest.raises(EngineError) as raised:
        shake(server, other, version="0.4.0", longest=99_999)
    text = str(raised.value)
    assert f"{server.url}: architectures = ['Qwen3ForCausalLM'], config.json has ['Qwen2ForCausalLM']" in text
    assert "model_type = qwen3, config.json has qwen2" in text
    assert f"SGLang {TESTED_VERSION}, expected 0.4.0" in text
    assert "the longest prompt with its response may have 99999" in text
    assert shake(server, model_path, version=None)


def test_another_vocabulary(server, model_path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match="the model's tokenizer to"):
        shake(server, other)
