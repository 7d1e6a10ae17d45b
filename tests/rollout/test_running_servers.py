"""A run asks running servers for their number of ranks, and refuses those to which no weights can be sent."""

import asyncio
import contextlib
from dataclasses import asdict

import pytest
import torch

from fipo_megatron.config import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, ServersConfig
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine, check_running_servers, open_engine, open_sender
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync import distributed_sender
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from tests.rollout.stub_servers import stub_servers
from tests.sglang import models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("served") / "model")


def config_of(model, servers, **options):
    return Config(
        model=ModelConfig(str(model)),
        data=DataConfig(max_prompt_tokens=16),
        reward=RewardConfig(overlong_buffer_tokens=0),
        rollout=RolloutConfig(
            max_response_tokens=64, servers=ServersConfig(urls=tuple(server.url for server in servers), **options)
        ),
    )


def opened_by(config, model, host):
    """Opens the engine of these servers and closes it again; returns it."""

    async def run():
        alone = [StoreCoordinator(torch.distributed.HashStore(), 0) for _ in range(2)]
        opened = await open_engine(config, host, *alone, load_tokenizer(model), models.VOCAB)
        await opened.close()
        return opened

    return asyncio.run(run())


def actor_weights():
    def stream(ranks):
        yield [("weight", torch.arange(4.0))]

    return ActorWeights(0, 1, 0, (0,), stream, lambda target: None, lambda what: contextlib.nullcontext())


@pytest.fixture
def host(tmp_path):
    return HostInfo(0, 0, (0,), cuda=False, directory=tmp_path, address="10.0.0.1")


TWO_ONE_TWO = [{}, {"tp_size": 1}, {}]


def test_rank_offsets_are_those_of_the_servers(model, host, monkeypatch):
    """``rollout.sglang.tp_size`` of the configuration, here 1, says nothing about servers that run already."""
    worlds = []
    monkeypatch.setattr(
        distributed_sender, "_join_group", lambda backend, address, port, world, name, timeout: worlds.append(world)
    )
    with stub_servers(load_tokenizer(model), *TWO_ONE_TWO) as servers:
        config = config_of(model, servers)
        opened = opened_by(config, model, host)
        assert [facts.ranks for facts in opened.facts] == [2, 1, 2]
        urls = [server.url for server in reversed(servers)]
        sender = open_sender(config, opened, urls, actor_weights(), (0,), host)
        sender.close()
    groups = [dict(server.posted)["/init_weights_update_group"] for server in reversed(servers)]
    assert [group["rank_offset"] for group in groups] == [1, 3, 4]
    assert [group["world_size"] for group in groups] == [6, 6, 6]
    assert {group["master_address"] for group in groups} == {"10.0.0.1"}
    assert worlds == [6]


def test_each_rank_of_a_server_is_sent_the_tensors(model, host):
    with stub_servers(load_tokenizer(model), *TWO_ONE_TWO) as servers:
        config = config_of(model, servers, sync="tensor")
        opened = opened_by(config, model, host)
        urls = [server.url for server in servers]
        with contextlib.closing(open_sender(config, opened, urls, actor_weights(), (0,), host)) as sender:
            sender.send(1)
    sent = [dict(server.posted)["/update_weights_from_tensor"] for server in servers]
    assert [len(body["serialized_named_tensors"]) for body in sent] == [2, 1, 2]


@pytest.mark.parametrize(("size", "kind"), [("dp_size", "data"), ("pp_size", "pipeline")])
def test_data_and_pipeline_parallel_servers_are_refused(size, kind, model):
    with stub_servers(load_tokenizer(model), {}, {size: 4}) as servers, pytest.raises(EngineError) as raised:
        asyncio.run(check_running_servers(config_of(model, servers), load_tokenizer(model), models.VOCAB))
    assert f"{servers[1].url}: {size} = 4, must be 1: weights cannot be sent to {kind}-parallel servers" in str(
        raised.value
    )
    assert servers[0].url not in str(raised.value)


def test_facts_are_the_same_on_every_rank(model, host):
    """Every rank that sends needs the ranks of every server; only the first one asks the servers."""
    store = torch.distributed.HashStore()
    with stub_servers(load_tokenizer(model), *TWO_ONE_TWO) as servers:
        config = config_of(model, servers)

        async def rank(number):
            stores = [torch.distributed.PrefixStore(name, store) for name in ("all", "hosts")]
            pair = [StoreCoordinator(each, number, (0,), 2) for each in stores]
            opened = await open_engine(config, host, *pair, load_tokenizer(model), models.VOCAB)
            await opened.close()
            return opened

        async def both():
            return await asyncio.gather(rank(0), rank(1))

        first, second = asyncio.run(both())
    assert isinstance(second, OpenedEngine)
    assert second.engine is None
    assert [asdict(facts) for facts in second.facts] == [asdict(facts) for facts in first.facts]
    assert len(first.facts) == 3
