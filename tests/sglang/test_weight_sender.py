"""Every weight sender makes a real server serve the actor's weights; a corrupted bucket is detected."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
import torch

from fipo_megatron.actor import parallel
from fipo_megatron.actor.hf_weights import export_hf, load_hf, save_hf
from fipo_megatron.actor.model import build_model
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.distributed_sender import DistributedSender
from fipo_megatron.rollout.weight_sync.probe import check_probe
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from fipo_megatron.rollout.weight_sync.tensor_sender import TensorSender
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import logits
from tests.distributed.launch import torchrun
from tests.sglang import models
from tests.sglang.sync_worker import PATHS, sender_of
from tests.sglang.test_client import client_of, expected, request

pytestmark = pytest.mark.sglang


def served(server, number=11, **options):
    """Returns a request, the server's response to it, and its weight version."""

    async def run():
        client = client_of(server, **options)
        try:
            one = request(number, 30)
            return one, await client.generate(one), await client.weight_version()
        finally:
            await client.close()

    return asyncio.run(run())


def gap(served, actor):
    return np.abs(served.astype(np.float64) - actor)


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


@pytest.fixture
def actor(layout, tmp_path):
    """Returns a function that builds an actor and its :class:`ActorWeights`."""

    def build(seed, spoil=lambda name, tensor: tensor):
        path = models.save(tmp_path / f"actor{seed}", seed=seed)
        architecture = Architecture.from_directory(path)
        chunks = build_model(architecture, ActorConfig(dtype="float32"), layout)
        load_hf(chunks, architecture, layout, path)

        def stream(on_ranks):
            for bucket in export_hf(chunks, architecture, layout, bucket_bytes=60_000, on_ranks=on_ranks):
                yield [(name, spoil(name, tensor)) for name, tensor in bucket]

        side = ActorWeights(
            stage=0,
            stages=1,
            rank=0,
            senders=(0,),
            stream=stream,
            save=lambda target: save_hf(chunks, architecture, layout, path, target),
            together=lambda what: contextlib.nullcontext(),
        )
        return chunks, side

    return build


def actor_log_probs(chunks, one, found):
    ids = torch.from_numpy(np.concatenate([one.tokens, found.tokens]).astype(np.int64))
    with torch.no_grad():
        [all_logits] = logits(chunks[0], [ids])
    log_probs = torch.log_softmax(all_logits, -1)[len(one.tokens) - 1 : -1]
    return log_probs.gather(1, ids[len(one.tokens) :, None])[:, 0].numpy()


@pytest.mark.parametrize("path", PATHS)
def test_served_weights_are_the_actors(path, server, actor, tmp_path):
    version = 10 + PATHS.index(path)
    before, found_before, _ = served(server)
    chunks, side = actor(seed=version)
    sender = sender_of(path, side, BlockingControlClient([server.url], "secret"), tmp_path)
    try:
        for again in range(2):  # the connection is used more than once
            sender.send(version + 100 * again)
    finally:
        sender.close()
    one, found, served_version = served(server)
    assert served_version == version + 100
    assert {span.weight_version for span in found.spans} == {version + 100}
    differences = gap(found.log_probs, actor_log_probs(chunks, one, found))
    largest = check_probe(differences, version, max_mean=1e-4, max_quantile=1e-4).largest
    np.testing.assert_allclose(found.log_probs, expected(models.model(seed=version), one, found), atol=1e-4, rtol=0)
    moved = np.abs(found_before.log_probs - actor_log_probs(chunks, before, found_before)).max()
    assert moved > 0.1 > 1000 * largest
    if path == "disk":
        assert [entry.name for entry in tmp_path.glob("version-*")] == [f"version-{version + 100}"]


@pytest.mark.parametrize("path", ["tensor", "distributed bucketed"])
def test_a_corrupted_bucket_is_detected(path, server, actor, tmp_path):
    def spoil(name, tensor):
        return tensor.roll(1, 0) if name == "model.layers.1.mlp.down_proj.weight" else tensor

    chunks, side = actor(seed=77, spoil=spoil)
    sender = sender_of(path, side, BlockingControlClient([server.url], "secret"), tmp_path)
    sender.send(77)
    sender.close()
    one, found, _ = served(server)
    differences = gap(found.log_probs, actor_log_probs(chunks, one, found))
    with pytest.raises(EngineError, match=r"after the update to version 77, .* it does not serve these weights"):
        check_probe(differences, 77, max_mean=1e-2, max_quantile=1e-2)


def test_a_server_that_refuses_is_named(server, actor, tmp_path):
    _, side = actor(seed=5)
    for url, key, text in (
        (server.url, "wrong", r"/begin_weight_update: HTTP status 401: unauthorised"),
        ("http://127.0.0.1:9", None, r"127.0.0.1:9/begin_weight_update: cannot be reached"),
    ):
        sender = TensorSender(side, BlockingControlClient([url], key), [1])
        with contextlib.closing(sender), pytest.raises(EngineError, match=text):
            sender.send(1)
    servers = BlockingControlClient([server.url], "secret")
    with contextlib.closing(servers), pytest.raises(EngineError, match="HTTP status 400"):
        servers.all("/update_weights_from_disk", {"model_path": str(tmp_path / "nowhere")})
    assert DistributedSender.send is TensorSender.send


@pytest.mark.parametrize("layout_name", ["TP2", "PP2"])
def test_actors_of_two_ranks_send(layout_name, server, tmp_path):
    """The two ranks share every matrix, or are two stages that send one after the other."""
    paths = {version: models.save(tmp_path / f"v{version}", seed=version) for version in range(20, 20 + len(PATHS))}
    torchrun(
        "tests.sglang.sync_worker",
        2,
        layout_name,
        server.url,
        json.dumps({version: str(path) for version, path in paths.items()}),
        str(tmp_path),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["path"] for result in results] == list(PATHS)
    for result in results:
        assert result["version"] == result["served_version"]
        assert result["error"] <= 1e-4, result
        assert result["moved"] > 0.1, result
