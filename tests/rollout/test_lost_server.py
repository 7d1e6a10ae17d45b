"""A server that dies within a broadcast of weights costs neither the trainer nor the servers that are left."""

import contextlib
import json
import multiprocessing
import threading
import time
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tests.processes  # noqa: F401  # the servers are forked from a process that has imported torch
from fipo_megatron.config import Config, DataConfig, ModelConfig, RolloutConfig, ServersConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.sglang.handshake import ServerFacts
from fipo_megatron.rollout.sglang.server import free_port
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync import distributed_sender
from fipo_megatron.rollout.weight_sync.distributed_sender import DistributedSender
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from fipo_megatron.trainer import weight_updater
from fipo_megatron.trainer.weight_updater import WeightUpdater
from tests.rollout import weight_server

pytestmark = pytest.mark.timeout(120)
WEIGHTS = {"first": torch.full((3, 4), 1.0), "second": torch.full((5,), 2.0), "third": torch.full((2, 2), 3.0)}
SUMS = {"first": 12.0, "second": 10.0, "third": 12.0}


def actor_side():
    return ActorWeights(
        stage=0,
        stages=1,
        rank=0,
        senders=(0,),
        stream=lambda on_ranks: ([(name, tensor)] for name, tensor in WEIGHTS.items()),
        save=lambda target: None,
        together=lambda what: contextlib.nullcontext(),
    )


def facts(url):
    with urllib.request.urlopen(url + "/model_info", timeout=20) as answer:
        return json.loads(answer.read())


class Servers:
    """Server processes by URL."""

    def __init__(self):
        self.processes = {}

    def start(self, dies=0, url=None):
        port = int(url.rsplit(":", 1)[1]) if url else free_port("127.0.0.1")
        process = multiprocessing.get_context("forkserver").Process(target=weight_server.main, args=(port, dies))
        process.start()
        url = f"http://127.0.0.1:{port}"
        self.processes[url] = process
        while True:
            assert process.is_alive()
            with contextlib.suppress(OSError):
                facts(url)
                return url
            time.sleep(0.02)

    def restart_when_dead(self, url):
        self.processes[url].join()
        self.start(url=url)


@pytest.fixture
def servers():
    found = Servers()
    yield found
    for process in found.processes.values():
        process.kill()
        process.join()


def test_the_group_is_aborted_and_a_new_one_without_the_dead_server_works(servers):
    alive, dead = servers.start(), servers.start(dies=2)
    sender = DistributedSender(actor_side(), BlockingControlClient([alive, dead]), [1, 1], backend="gloo")
    group = sender._group
    with pytest.raises(EngineError, match=f"{dead}/update_weights_from_distributed: cannot be reached"):
        sender.send(1)
    assert group not in dist.distributed_c10d._world.pg_map
    sender.abort()
    again = DistributedSender(actor_side(), BlockingControlClient([alive]), [1], backend="gloo")
    again.send(1)
    again.close()
    assert facts(alive) == {"weight_version": "1", "weights": SUMS}


@dataclass
class Recorded:
    """Servers and a group that only note what is asked of them, in order.

    Attributes:
        events: The notes.
        answers: Results of the calls by path: an error, None for success, or absent for calls that are never answered.
    """

    answers: dict = field(default_factory=dict)
    events: list = field(default_factory=list)
    urls: tuple = ("http://a", "http://b")
    calls: list = field(default_factory=list)

    def begin(self, path, payloads):
        self.events.append(f"begin {path}")
        found = {url: Future() for url in payloads}
        for url, call in found.items():
            self.calls.append(call)
            answer = self.answers.get(path, {}).get(url, "never")
            if isinstance(answer, Exception):
                call.set_exception(answer)
            elif answer is None:
                call.set_result({})
        return list(found.values())

    def all(self, path, payload=None):
        return [call.result() for call in self.begin(path, dict.fromkeys(self.urls, payload or {}))]

    def broadcast(self, tensor, root):
        """As with NCCL, the broadcast never ends once a rank is lost, and nothing reports an error."""
        self.events.append("broadcast")
        return SimpleNamespace(is_completed=lambda: False, wait=lambda: threading.Event().wait())

    def close(self):
        self.events.append("close connections")

    def abort_group(self, group):
        self.events.append("abort group")

    def destroy_group(self, group):
        self.events.append("destroy group")
        for call in self.calls:
            if not call.done():
                call.set_result({})  # destroying is a collective: the servers' calls end with ours


@pytest.fixture
def recorded(monkeypatch):
    found = Recorded(answers={path: dict.fromkeys(Recorded.urls) for path in ("/init_weights_update_group",)})
    monkeypatch.setattr(distributed_sender, "_join_group", lambda *arguments: found)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", found.abort_group)
    monkeypatch.setattr(dist, "destroy_process_group", found.destroy_group)
    return found


@pytest.mark.timeout(30)
def test_a_broadcast_that_never_ends_is_aborted_before_anything_waits(recorded):
    """The second server has died; the first one waits in the broadcast and does not answer."""
    ok, path = dict.fromkeys(recorded.urls), "/update_weights_from_distributed"
    recorded.answers |= {"/begin_weight_update": ok, "/end_weight_update": ok}
    recorded.answers |= {path: {"http://b": EngineError("b has died")}}
    sender = DistributedSender(actor_side(), recorded, [1, 1])
    with pytest.raises(EngineError, match="b has died"):
        sender.send(1)
    sender.abort()
    assert recorded.events == [
        "begin /init_weights_update_group",
        "begin /begin_weight_update",
        f"begin {path}",
        "broadcast",
        "abort group",
        "begin /end_weight_update",
        "begin /destroy_weights_update_group",
        "close connections",
    ]


@pytest.mark.timeout(30)
def test_both_sides_destroy_the_group_at_the_same_time(recorded):
    """NCCL documents destroying as a collective: servers that wait for the trainer must not be waited for first."""
    DistributedSender(actor_side(), recorded, [1, 1]).close()
    assert recorded.events[1:] == ["begin /destroy_weights_update_group", "destroy group", "close connections"]


@pytest.mark.timeout(30)
def test_a_group_with_a_dead_server_is_aborted_instead(recorded):
    recorded.answers["/destroy_weights_update_group"] = {"http://b": EngineError("b has died"), "http://a": None}
    DistributedSender(actor_side(), recorded, [1, 1]).close()
    assert recorded.events[1:] == ["begin /destroy_weights_update_group", "abort group", "close connections"]


@pytest.fixture
def updater_of(tmp_path, monkeypatch):
    """Returns a function that opens an updater with servers, and closes everything after the test."""
    loop = EventLoopThread()
    opened = []

    def build(*urls):
        config = Config(
            model=ModelConfig("nowhere"),
            data=DataConfig(),
            rollout=RolloutConfig(servers=ServersConfig(urls=urls, sync="distributed", patience_seconds=60.0)),
        )

        async def client():
            return SglangClient(urls, context=8, vocab=8, look_seconds=600.0)

        monkeypatch.setattr(weight_updater, "actor_weights", lambda *_: actor_side())
        monkeypatch.setattr("socket.gethostname", lambda: "127.0.0.1")
        facts = tuple(ServerFacts(url, "", 0, context=8, dtype="float32", ranks=1) for url in urls)
        engine = OpenedEngine(loop.run(client()), facts=facts)
        host = HostInfo(0, 0, (0,), cuda=False, directory=tmp_path)
        coordinator = StoreCoordinator(dist.HashStore(), 0)
        updater = WeightUpdater(config, None, None, host, engine, coordinator, loop, ())
        opened.append((updater, engine))
        return updater, engine.engine.pool

    yield build
    for updater, engine in opened:
        updater.close()
        loop.run(engine.close())
    loop.close()


def test_the_update_goes_on_with_the_servers_that_are_left(servers, updater_of):
    alive, dead = servers.start(), servers.start(dies=5)
    updater, pool = updater_of(alive, dead)
    updater.send(1)
    assert [worker.url for worker in pool.alive] == [alive, dead]
    updater.send(2)
    assert facts(alive) == {"weight_version": "2", "weights": SUMS}
    assert [worker.url for worker in pool.alive] == [alive]
    assert "did not answer when weights 2 were sent" in pool.workers[dead].lost_because
    updater.send(3)
    assert facts(alive)["weight_version"] == "3"


def test_the_update_waits_for_the_only_server_to_come_back(servers, updater_of):
    url = servers.start(dies=2)
    restarting = threading.Thread(target=servers.restart_when_dead, args=(url,))
    restarting.start()
    updater, pool = updater_of(url)
    updater.send(1)
    restarting.join()
    assert facts(url) == {"weight_version": "1", "weights": SUMS}
    assert [worker.url for worker in pool.alive] == [url]
