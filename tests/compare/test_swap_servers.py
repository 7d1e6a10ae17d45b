"""Settings of ``fipo compare swap`` with SGLang servers, checked before a server is started or asked."""

import json

import pytest
import torch

from examples.quickstart import task
from fipo_megatron import cli
from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron
from fipo_megatron.compare.swap_engines import hosts_of
from fipo_megatron.config import load_config
from fipo_megatron.rollout.engine import EngineError
from tests.runs import CONFIG

SERVED = ("rollout.engine=sglang", "compare.select=[delta]")
URLS = ("compare.base_urls=[http://127.0.0.1:1]", "compare.rl_urls=[http://127.0.0.1:2]")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Builds problems and a model with random weights."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    file = directory / "held_out.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:2]))
    return directory


def swap(data, output, *overrides):
    return cli.main(
        [
            *("compare", "swap", str(CONFIG), f"run.output={output}", f"evaluation.files=[{data}/held_out.jsonl]"),
            *(f"compare.base={data}/model", f"compare.rl={data}/model", "rollout.max_response_tokens=4"),
            *overrides,
        ]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=sglang"], "'random']: must be [delta] with rollout.engine = sglang"),
        (
            [*SERVED, "evaluation.temperature=0.7"],
            "evaluation.temperature = 0.7: must be 1 with rollout.engine = sglang",
        ),
        ([*SERVED, "rollout.servers.urls=[http://a:1]"], "rollout.servers.urls = ['http://a:1']: must not be set"),
        ([*SERVED, URLS[1]], "compare.base_urls: empty, with compare.rl_urls = ['http://127.0.0.1:2']"),
        ([*SERVED, "compare.base_urls=[a:1]"], "compare.base_urls = a:1: must begin with http:// or https://"),
        (
            [*SERVED, URLS[0], "compare.rl_urls=[http://b:1,http://127.0.0.1:1]"],
            "compare.rl_urls = ['http://b:1', 'http://127.0.0.1:1']: http://127.0.0.1:1 is in compare.base_urls, too",
        ),
        (
            ["rollout.engine=embedded", URLS[1]],
            "compare.rl_urls = ['http://127.0.0.1:2']: needs rollout.engine = sglang",
        ),
    ],
)
def test_mistakes_are_one_sentence(data, tmp_path, capsys, overrides, message):
    assert swap(data, tmp_path, *overrides) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_refused_with_running_servers(data, tmp_path, capsys):
    hf_to_megatron(data / "model", tmp_path / "checkpoint", Options())
    assert swap(data, tmp_path, *SERVED, *URLS, f"compare.rl={tmp_path}/checkpoint") == 2
    assert "must be a Hugging Face directory with compare.rl_urls" in capsys.readouterr().err


def test_points_of_another_engine_are_refused(data, tmp_path, capsys, caplog):
    assert swap(data, tmp_path, "rollout.engine=embedded", "compare.select=[delta]") == 0
    file = tmp_path / "swap-model" / "settings.json"
    for settings in (json.loads(file.read_text()), {**json.loads(file.read_text()), "engine": None}):
        file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
        assert swap(data, tmp_path, "rollout.engine=embedded", "compare.select=[delta]") == 0
        assert swap(data, tmp_path, *SERVED) == 2
        assert "holds points with another engine; choose another name" in capsys.readouterr().err + caplog.text


def test_servers_of_the_models_have_their_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8,9,10,11")
    given = ["rollout.engine=sglang", "rollout.servers.per_host=2", "rollout.sglang={tp_size: 2}"]
    hosts = hosts_of(load_config(CONFIG, given), tmp_path)
    assert [hosts[role].gpus.first for role in ("base", "rl")] == [(0, 2), (4, 6)]
    assert [hosts[role].directory.name for role in ("base", "rl")] == ["servers-base", "servers-rl"]
    assert hosts_of(load_config(CONFIG, [*given, *URLS]), tmp_path)["rl"].gpus is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5")
    with pytest.raises(EngineError, match=r"per_host = 2, for each of two models: .* needs the GPUs 0-7; servers see"):
        hosts_of(load_config(CONFIG, given), tmp_path)
