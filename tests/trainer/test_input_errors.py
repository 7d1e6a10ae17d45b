"""Model directories, data files and configurations that are wrong: one sentence each, before anything is built."""

import json
import logging
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fipo_megatron.train
from fipo_megatron import convert
from fipo_megatron.trainer import training_inputs
from tests.runs import arguments

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def error_of(capsys, monkeypatch, data, tmp_path):
    """Calls ``fipo_megatron.train.main`` with a copy of the model; returns its lines and checks that nothing was made.

    Megatron cannot be imported meanwhile, unless it is already.
    """
    root = logging.getLogger()
    before = root.level, root.handlers[:]

    def call(*overrides):
        start = time.process_time()
        assert fipo_megatron.train.main(arguments(data, tmp_path / "run", *overrides)) == 2
        assert time.process_time() - start < 5
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed
        assert not (tmp_path / "run").exists()
        return printed

    monkeypatch.setattr(training_inputs, "check_megatron_options", _fail)
    yield call
    root.level, root.handlers[:] = before


def _fail(*_):
    raise AssertionError("the inputs were accepted")


@pytest.fixture
def model(data, tmp_path):
    """A copy of the model that a test may spoil."""
    shutil.copytree(data / "model", tmp_path / "model")
    return tmp_path / "model"


def edit(name, **changes):
    """Returns a function that changes keys of a JSON file of the model; None removes a key."""

    def spoil(model):
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def write(name, content):
    """Returns a function that writes a file of the model."""
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names):
    """Returns a function that removes files of the model."""
    return lambda model: [(model / name).unlink() for name in names]


def truncate(name, size):
    """Returns a function that keeps the first bytes of a file, or all but the last if ``size`` is negative."""
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size])


def tensors(change):
    """Returns a function that changes the tensors of the model."""

    def spoil(model):
        held = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
        change(held)
        save_file(held, model / "model.safetensors")

    return spoil


def only_bin(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            remove("tokenizer.json"),
            "no tokenizer; expected tokenizer.json, tokenizer.model, vocab.json with merges.txt",
        ),
        (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer; expected tokenizer.json"),
        (write("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer: it has no model with a vocab"),
        (write("tokenizer.json", b"\xff\xfe"), "tokenizer.json: not UTF-8"),
        (write("tokenizer.json", "[" * 100_000), "tokenizer.json: nested too deeply"),
        (truncate("tokenizer.json", -9), "tokenizer.json: not JSON"),
        (edit("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}), "an empty tokenizer"),
        (edit("tokenizer.json", pre_tokenizer={"type": "Nothing"}), "no tokenizer: "),
        (write("tokenizer_config.json", "[1]"), "tokenizer_config.json: expected a JSON object, got list"),
        (remove("model.safetensors"), "holds neither model.safetensors nor model.safetensors.index.json"),
        (only_bin, "pytorch_model.bin: PyTorch's own format is not read"),
        (write("model.safetensors", b""), "model.safetensors: truncated or corrupt"),
        (truncate("model.safetensors", 1000), "model.safetensors: truncated or corrupt"),
        (truncate("model.safetensors", -1), "model.safetensors: truncated or corrupt"),
        (write("model.safetensors", b"\xff" * 64), "model.safetensors: truncated or corrupt"),
        (
            tensors(lambda held: held.pop("model.norm.weight")),
            "model.norm.weight: missing, expected [64]",
        ),
        (
            tensors(lambda held: held.update({"model.norm.weight": torch.zeros(65)})),
            "model.norm.weight: has shape [65], expected [64]",
        ),
        (
            tensors(lambda held: held.update({"model.norm.weigth": held.pop("model.norm.weight")})),
            "model.norm.weigth: unexpected",
        ),
        (write("model.safetensors.index.json", '{"weight_map": [1]}'), "weight_map: expected an object"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'), "weight_map: expected an object"),
        (write("config.json", b"\x80\x02binary"), "config.json: not UTF-8"),
        (write("config.json", ""), "config.json: not JSON"),
        (write("config.json", "[]"), "config.json: expected a JSON object, got list"),
        (write("config.json", '{"a":' * 100_000), "config.json: nested too deeply"),
        (edit("config.json", num_attention_heads=0), "num_attention_heads = 0: must be an integer from 1"),
        (edit("config.json", num_hidden_layers=-1), "num_hidden_layers = -1: must be an integer from 1"),
        (edit("config.json", num_hidden_layers=10**12), "num_hidden_layers = 1000000000000: must be an integer"),
        (edit("config.json", hidden_size="64"), "hidden_size = '64': must be an integer from 1"),
        (edit("config.json", hidden_size=63), "num_attention_heads = 4: must be a divisor of hidden_size = 63"),
        (edit("config.json", num_key_value_heads=3), "num_key_value_heads = 3: must be a divisor of num_att"),
        (edit("config.json", vocab_size=True), "vocab_size = True: must be an integer from 1"),
        (edit("config.json", rms_norm_eps="1e-6"), "rms_norm_eps = '1e-6': must be a positive number"),
        (edit("config.json", rope_parameters=[1]), "rope_parameters = [1]: must be an object"),
        (edit("config.json", rope_parameters={"rope_theta": "x"}), "rope_parameters.rope_theta = 'x': must be"),
        (edit("config.json", architectures=5), "architectures = 5: supported are"),
        (edit("config.json", architectures=[{}]), "architectures = [{}]: supported are"),
        (edit("config.json", tie_word_embeddings="no"), "tie_word_embeddings = 'no': must be true or false"),
        (write("generation_config.json", '{"eos_token_id": [1,'), "generation_config.json: not JSON"),
        (write("generation_config.json", "[2]"), "generation_config.json: expected a JSON object, got list"),
        (edit("generation_config.json", eos_token_id="2"), "generation_config.json: eos_token_id = '2': must be an id"),
        (edit("generation_config.json", eos_token_id=[2, 9999]), "eos_token_id = [2, 9999]: must be an id below"),
        (edit("generation_config.json", eos_token_id=-1), "eos_token_id = -1: must be an id below"),
        (edit("config.json", eos_token_id=300), "config.json: eos_token_id = 300: must be an id below"),
        (write("chat_template.jinja", "{% if %}"), "its chat template: TemplateSyntaxError"),
        (write("chat_template.jinja", "{{ raise_exception('no') }}"), "its chat template: TemplateError: no"),
        (write("chat_template.jinja", "{{ 1 / 0 }}"), "its chat template: ZeroDivisionError"),
        (write("chat_template.jinja", LOOP), "its chat template: needs more than 1 s of CPU time"),
        (write("chat_template.jinja", "{{ 'a' * 10 ** 11 }}"), "its chat template: needs more than 512 MiB of memory"),
        (write("chat_template.jinja", b"\xff"), "chat_template.jinja: cannot be read: 'utf-8' codec"),
    ],
)
def test_a_model_directory_that_is_wrong(spoil, message, model, error_of):
    spoil(model)
    said = error_of(f"model.path={model}")
    assert message in said
    assert str(model) in said
    assert len(said.splitlines()) <= 2, said


def test_a_tied_model_whose_output_weight_differs(model, error_of, tmp_path, capsys):
    tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))(model)
    directory = training_inputs.read_model_directory(model, _data_config(), weights=True)
    assert not directory.problems
    tensors(lambda held: held["lm_head.weight"][-1].add_(1))(model)
    assert "lm_head.weight differs from model.embed_tokens.weight" in error_of(f"model.path={model}")
    assert convert.main(["hf-to-megatron", str(model), str(tmp_path / "out")]) == convert.REFUSED
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sft_needs_an_eos_token_of_the_tokenizer(model, error_of):
    edit("tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast")(model)
    edit("config.json", model_type="unknown")(model)  # else transformers takes the class of the model
    directory = training_inputs.read_model_directory(model, _data_config(), weights=False)
    assert directory.stop_token_ids == (2,)
    assert not directory.problems
    (problem,) = training_inputs.read_model_directory(model, _data_config(), weights=False, needs_eos=True).problems
    assert "its tokenizer has no eos token, which algorithm.kind = sft needs" in problem
    edit("generation_config.json", eos_token_id=None)(model)
    edit("config.json", eos_token_id=None)(model)
    assert "neither tokenizer, generation_config.json nor config.json" in error_of(f"model.path={model}")


def test_stop_tokens_of_all_files_are_used(model):
    """Those of the tokenizer, of generation_config.json and of config.json."""
    edit("config.json", eos_token_id=[5, 2])(model)
    edit("generation_config.json", eos_token_id=7)(model)
    directory = training_inputs.read_model_directory(model, _data_config(), weights=False)
    assert directory.stop_token_ids == (2, 5, 7)
    remove("generation_config.json")(model)
    edit("tokenizer_config.json", eos_token=None)(model)
    directory = training_inputs.read_model_directory(model, _data_config(), weights=False)
    assert directory.stop_token_ids == (0, 2, 5)  # without an eos token of its own, a Qwen2 tokenizer has token 0
    assert not directory.problems


def test_code_of_a_model_directory_is_not_run_and_nobody_is_asked(model, error_of, monkeypatch):
    """transformers would ask on stdin whether to trust the code."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit("config.json", auto_map=auto_map, model_type="evil")(model)
    edit("tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")(model)
    assert "no tokenizer: " in error_of(f"model.path={model}")
    assert not (model / "ran").exists()


def _data_config():
    return training_inputs.Config().data


def test_the_model_is_not_spoilt_by_the_tests(model):
    assert np.isfinite(load_file(model / "model.safetensors")["model.norm.weight"].numpy()).all()
    assert not training_inputs.read_model_directory(model, _data_config(), weights=True).problems
