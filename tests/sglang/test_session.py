"""A rollout session with real servers that it starts: weights, the hand-over of the device, servers that die."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.config import ParallelConfig, ServersConfig
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.weights.architecture import Architecture
from tests.distributed.session_worker import Prompts, host_of, learn, prompt, score
from tests.distributed.test_session import config_of
from tests.sglang.conftest import ROOT
from tests.sglang.test_loss import alive

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


@pytest.fixture
def opened(layout, model_path, tmp_path, monkeypatch):
    """Returns a function that opens a session; the session is closed after the test."""
    monkeypatch.setenv("FIPO_SGLANG_API_KEY", "secret")
    sessions = []

    def build(servers, **rollout):
        servers = {
            "python": str(ROOT / ".venv-sglang" / "bin" / "python"),
            "ready_seconds": 240.0,
            "max_probe_mean_shift": 1e-4,
            "max_probe_quantile_shift": 1e-4,
        } | servers
        config = config_of(
            model_path,
            engine="sglang",
            servers=ServersConfig(**servers),
            **({"sglang": {"max_total_tokens": 32768, "enable_memory_saver": False}} | rollout),
        )
        architecture = Architecture.from_directory(model_path)
        actor = MegatronActor(config, architecture, layout, lambda c: load_hf(c, architecture, layout, model_path))
        session = RolloutSession(
            config,
            actor,
            architecture,
            host_of(layout, tmp_path),
            parallel.store(),
            tokenizer=load_tokenizer(model_path),
            scorer=score,
            stop_token_ids=(1,),
            probe=[prompt(number) for number in range(990, 998)],
        )
        sessions.append(session)
        return session, actor

    yield build
    for session in sessions:
        session.close()


def test_the_device_is_handed_over_in_order(opened, monkeypatch):
    """The device has one owner at a time, and nothing is used while it is offloaded."""
    session, actor = opened({"colocated": True, "sync": "tensor"})
    calls = []
    engine = session._opened.engine

    def recorded(owner, name, describe):
        original = getattr(owner, name)

        def call(*arguments, **options):
            calls.append(describe(*arguments, **options))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    recorded(engine, "release_memory", lambda *what: f"engine releases {' '.join(what)}")
    recorded(engine, "restore_memory", lambda *what: f"engine takes {' '.join(what)}")
    recorded(session.weights, "send", lambda version: "weights are sent")
    recorded(session, "sample", lambda prompts: "responses are sampled")
    recorded(actor, "log_probs", lambda *_: "actor computes")
    recorded(actor, "update", lambda *_: "actor learns")
    original = actor.offloaded

    class Recorded:
        def __init__(self, **kept):
            self.what = "optimizer and gradients" if "parameters" in kept else "weights"
            self.block = original(**kept)

        def __enter__(self):
            calls.append(f"actor releases {self.what}")
            return self.block.__enter__()

        def __exit__(self, *error):
            calls.append(f"actor takes {self.what}")
            return self.block.__exit__(*error)

    monkeypatch.setattr(actor, "offloaded", Recorded)
    prompts = Prompts()
    results = [learn(session, actor, prompts, version) for version in range(2)]
    hand_over = [
        "actor releases optimizer and gradients",
        "engine takes weights",
        "weights are sent",
        "actor releases weights",
        "engine takes kv_cache cuda_graph",
        "responses are sampled",
        "engine releases kv_cache weights cuda_graph",
        "actor takes weights",
        "actor takes optimizer and gradients",
        "actor computes",  # the probe
        "actor computes",
        "actor learns",
    ]
    assert calls == [*hand_over, *hand_over]
    assert all(result["mismatch"] < 1e-4 for result in results)
    assert [result["versions"] for result in results] == [[0], [1]]


def kill_when_busy(session, killed):
    """Kills the first server while it samples the responses of a step, not the probe before them."""
    server = session._opened.pool.servers[0]
    worker = session.weights._client.pool.workers[server.url]
    while all(name.startswith("probe/") for name in list(worker.tasks)):
        time.sleep(0.01)
    time.sleep(0.3)
    killed.append(len(worker.tasks))
    for process in alive(server.process_id):
        os.kill(process, signal.SIGKILL)


def test_no_prompt_is_lost_when_servers_die(opened):
    """The only server is killed twice while it samples. First it is restarted and gets the weights. The second time it
    has no restarts left: the error is raised in time, and the prompts of the step are carried."""
    session, actor = opened(
        {"sync": "distributed", "restarts": 1, "patience_seconds": 90.0, "progress_seconds": 30.0},
        max_response_tokens=200,
    )
    prompts = Prompts()
    first = learn(session, actor, prompts, 0)
    killed = []
    thread = threading.Thread(target=kill_when_busy, args=(session, killed))
    thread.start()
    second = learn(session, actor, prompts, 1)
    thread.join()
    assert killed[0] > 0
    assert session._opened.pool.servers[0].starts == 2
    assert [first["versions"], second["versions"]] == [[0], [1]]
    assert max(first["mismatch"], second["mismatch"]) < 1e-4
    given = prompts.given
    assert given == 8, "the prompts of the step that was interrupted were sampled, not new ones"
    session.weights._client.pool.patience_seconds = 3.0
    thread = threading.Thread(target=kill_when_busy, args=(session, killed))
    thread.start()
    with session.serving_weights(2):
        with pytest.raises(EngineError, match="no SGLang server has come back within 3 s"):
            session.sample(prompts)
        told = time.monotonic()
    thread.join()
    assert time.monotonic() - told < 60, "nothing waits for what is dead"
    assert not alive(session._opened.pool.servers[0].process_id or 0)
    groups, partial = session.sampler.carried()
    assert not groups
    assert [one.prompt.id for one in partial] == [str(n) for n in range(given, given + 4)]
    assert all(len(one.partial) == 2 for one in partial)
    assert replace(partial[0].prompt).tokens.tolist() == prompt(given).tokens.tolist()
