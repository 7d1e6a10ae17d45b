"""Servers that share the GPUs of the actor: never is the memory of both on the device."""

import pytest

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.config import ParallelConfig, ServersConfig
from fipo_megatron.rollout.engine_factory import OpenedEngine
from fipo_megatron.rollout.sampler import SamplingExhaustedError
from fipo_megatron.trainer import rollout_session
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import random_model
from tests.distributed.session_worker import host_of, prompt, score
from tests.distributed.test_session import config_of

pytestmark = pytest.mark.distributed


class EngineMemoryRecord:
    """An engine that records what it has on the device, and whether the actor has its weights there as well."""

    def __init__(self, actor):
        self._actor = actor
        self.held = {"kv_cache", "weights", "cuda_graph"}
        self.calls = []
        self.check()

    def check(self):
        weights = any(parameter.untyped_storage().nbytes() for parameter in self._actor.parameters())
        optimizer = any(tensor.untyped_storage().nbytes() for tensor in self._actor.optimizer_state())
        if {"kv_cache", "cuda_graph"} & self.held:
            assert not weights, "the actor is offloaded while the engine has its caches"
        if self.held:
            assert not optimizer, "the optimizer is offloaded while the engine has memory"

    async def release_memory(self, *what):
        assert self.held >= {*what}, "SGLang fails if memory is released twice"
        self.calls.append(("release", *what))
        self.check()
        self.held -= {*what}

    async def restore_memory(self, *what):
        assert not self.held & {*what}, "SGLang fails if memory is restored twice"
        self.calls.append(("restore", *what))
        self.held |= {*what}
        self.check()

    async def close(self):
        pass


@pytest.fixture
def session_and_engine(tmp_path, monkeypatch):
    path = tmp_path / "model"
    random_model("qwen3", 0, max_position_embeddings=256, eos_token_id=1).save_pretrained(path)
    layout = parallel.initialize(ParallelConfig(), seed=1, environment={})
    config = config_of(path, engine="sglang", servers=ServersConfig(colocated=True, sync="tensor"))
    architecture = Architecture.from_directory(path)
    actor = MegatronActor(config, architecture, layout, lambda c: load_hf(c, architecture, layout, path))

    async def start_servers(*arguments):
        return OpenedEngine(EngineMemoryRecord(actor))

    monkeypatch.setattr(rollout_session, "open_engine", start_servers)
    session = RolloutSession(
        config,
        actor,
        architecture,
        host_of(layout, tmp_path),
        parallel.store(),
        tokenizer=None,
        scorer=score,
        stop_token_ids=(1,),
        probe=[prompt(999)],
    )
    monkeypatch.setattr(session.weights, "send", lambda version: None)
    monkeypatch.setattr(session.weights, "sample_probe", lambda: None)
    yield session, session.engine
    session.close()
    parallel.destroy()


def test_servers_start_and_sample_only_while_the_actor_is_offloaded(session_and_engine):
    session, engine = session_and_engine
    everything = ("release", "kv_cache", "weights", "cuda_graph")
    assert engine.calls == [everything]
    for _ in range(2):
        assert not engine.held
        with session.serving_weights(0):
            assert engine.held == {"kv_cache", "weights", "cuda_graph"}
    hand_over = [("restore", "weights"), ("restore", "kv_cache", "cuda_graph"), everything]
    assert engine.calls == [everything, *hand_over, *hand_over]


def test_memory_is_released_before_the_actor_is_saved_after_an_error(session_and_engine):
    session, engine = session_and_engine
    with pytest.raises(SamplingExhaustedError), session.serving_weights(0):
        raise SamplingExhaustedError("all groups are equal")
    assert not engine.held
