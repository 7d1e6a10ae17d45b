"""The client with one real server: log-probs, stop tokens, aborts, pauses, and refused requests."""

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch

from fipo_megatron.data.trajectory import TokenSpan
from fipo_megatron.rollout.engine import (
    EngineError,
    GenerationRequest,
    RequestError,
    SamplingParameters,
    sampling_seed,
)
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.server import check_arguments
from tests.sglang import models

pytestmark = pytest.mark.sglang


def client_of(server, **options):
    options = {"context": models.CONTEXT, "vocab": models.VOCAB, "api_key": "secret", "look_seconds": 0.5} | options
    return SglangClient([server.url], **options)


def with_client(server, use, **options):
    async def run():
        client = client_of(server, **options)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


def request(number, max_tokens=40, temperature=1.0, length=20, **sampling):
    tokens = np.random.default_rng(number).integers(2, models.VOCAB, length).astype(np.int32)
    parameters = SamplingParameters(temperature, max_tokens, **sampling)
    return GenerationRequest(f"{number}/0", str(number), tokens, parameters, sampling_seed(0, str(number), 0, 0))


def expected(model, request, found):
    ids = torch.from_numpy(np.concatenate([request.tokens, found.tokens]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double() / request.sampling.temperature
    log_probs = torch.log_softmax(logits, -1)[len(request.tokens) - 1 : -1]
    return log_probs.gather(1, ids[len(request.tokens) :, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_transformers(server, temperature):
    requests = [request(n, temperature=temperature, top_p=0.9 if n % 2 else 1.0) for n in range(8)]

    async def use(client):
        return await asyncio.gather(*map(client.generate, requests))

    model, other = models.model(), models.model(seed=5)
    for one, found in zip(requests, with_client(server, use), strict=True):
        assert found.tokens.dtype == np.int32
        assert found.log_probs.dtype == np.float32
        np.testing.assert_allclose(found.log_probs, expected(model, one, found), atol=1e-4, rtol=0)
        assert np.abs(found.log_probs - expected(other, one, found)).max() > 0.1
        assert found.spans == (TokenSpan(0, 0),)


def test_stop_tokens_belong_to_the_response(server):
    stops = tuple(range(2, 60))

    async def use(client):
        return await asyncio.gather(*(client.generate(request(n, 400, stop_token_ids=stops)) for n in range(6)))

    for found in with_client(server, use):
        ends = [i for i, token in enumerate(found.tokens.tolist()) if token in stops or token == 1]
        assert found.finish_reason == "stop"
        assert ends == [len(found.tokens) - 1]


def test_an_aborted_response_can_be_continued(server):
    first = request(3, 1200)

    async def use(client):
        task = asyncio.create_task(client.generate(first))
        others = [asyncio.create_task(client.generate(request(n, 30))) for n in (4, 5)]
        await asyncio.sleep(1.0)
        await client.abort([first.id])
        part = await task
        rest_of = replace(
            first,
            tokens=np.concatenate([first.tokens, part.tokens]),
            sampling=replace(first.sampling, max_tokens=25),
        )
        return part, rest_of, await client.generate(rest_of), [await other for other in others]

    part, rest_of, rest, others = with_client(server, use)
    assert part.finish_reason == "abort"
    assert 0 < len(part.tokens) < 1200
    np.testing.assert_allclose(part.log_probs, expected(models.model(), first, part), atol=1e-4, rtol=0)
    np.testing.assert_allclose(rest.log_probs, expected(models.model(), rest_of, rest), atol=1e-4, rtol=0)
    assert [len(other.tokens) for other in others] == [30, 30]


def test_all_requests_can_be_aborted_also_waiting_ones(server):
    async def use(client):
        tasks = [asyncio.create_task(client.generate(request(n, 1500))) for n in range(6)]
        await asyncio.sleep(0.3)
        await client.abort()
        found = await asyncio.wait_for(asyncio.gather(*tasks), 30)
        again = await client.generate(request(0, 5))
        return found, again

    found, again = with_client(server, use, concurrency=2)
    assert [one.finish_reason for one in found] == ["abort"] * 6
    assert [len(one.tokens) for one in found[2:]] == [0] * 4
    assert len(again.tokens) == 5


def test_nothing_is_sampled_while_paused(server):
    async def use(client):
        task = asyncio.create_task(client.generate(request(7, 1200)))
        await asyncio.sleep(0.5)
        await client.pause()
        late = asyncio.create_task(client.generate(request(8, 5)))
        await asyncio.sleep(6.0)  # longer than progress_seconds below, which must not count while paused
        before = task.done(), late.done()
        await client.resume()
        return before, await task, await late, client.losses

    before, found, late, losses = with_client(server, use, progress_seconds=4.0)
    assert before == (False, False)
    assert not losses
    assert len(late.tokens) == 5
    np.testing.assert_allclose(found.log_probs, expected(models.model(), request(7, 1200), found), atol=1e-4, rtol=0)


def scheduler_of(server):
    """Returns the id of the process that samples; another process answers requests."""
    [found] = [
        int(status.parent.name)
        for status in Path("/proc").glob("[0-9]*/status")
        if f"PPid:\t{server.process_id}\n" in (text := status.read_text()) and "Name:\tsglang::schedul" in text
    ]
    return found


def test_a_server_that_answers_but_samples_nothing_is_lost_and_comes_back(server):
    hangs = scheduler_of(server)

    async def use(client):
        task = asyncio.create_task(client.generate(request(7, 1200)))
        await asyncio.sleep(0.5)
        os.kill(hangs, signal.SIGSTOP)
        while not client.losses:
            await asyncio.sleep(0.1)
        await asyncio.sleep(5.0)
        [health] = await client.health()
        losses = client.losses
        os.kill(hangs, signal.SIGCONT)
        found = await task
        await client.control("/flush_cache")  # refused while the server still samples the first attempt
        return health, losses, found

    try:
        health, losses, found = with_client(server, use, progress_seconds=4.0)
    finally:
        os.kill(hangs, signal.SIGCONT)
    assert (health.alive, health.weight_version, losses) == (False, 0, 1), "the hung server was used again"
    np.testing.assert_allclose(found.log_probs, expected(models.model(), request(7, 1200), found), atol=1e-4, rtol=0)


def forget_all(server):
    """Ends the requests of earlier clients."""

    async def use(client):
        await client.control("/abort_request", {"abort_all": True})
        await client.control("/flush_cache?timeout=60")

    with_client(server, use)


def test_a_server_that_stays_hung_is_reported(server):
    hangs = scheduler_of(server)

    async def use(client):
        os.kill(hangs, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"(?s)come back within 6 s:.*no progress for 3 s"):
            await client.generate(request(7, 1200))

    try:
        with_client(server, use, progress_seconds=3.0, patience_seconds=6.0)
    finally:
        os.kill(hangs, signal.SIGCONT)
    forget_all(server)


def test_control_health_and_versions(server):
    async def use(client):
        assert await client.weight_version() == 0
        [health] = await client.health()
        assert (health.name, health.alive, health.weight_version) == (server.url, True, 0)
        await client.release_memory("kv_cache")
        await client.restore_memory("kv_cache")
        answer = await client.control("/flush_cache")
        assert list(answer) == [server.url]
        with pytest.raises(EngineError, match=r"/no_such_path: HTTP status 404"):
            await client.control("/no_such_path")

    with_client(server, use)


def test_wrong_key(server):
    async def use(client):
        with pytest.raises(EngineError, match="unauthorised"):
            await client.generate(request(1))
        with pytest.raises(EngineError, match="unauthorised"):
            await client.weight_version()

    with_client(server, use, api_key="wrong")


def test_the_key_is_in_no_command_line_and_not_in_the_log(server):
    """Any user of the host can read command lines; the log is part of the run's output."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(process.name)) == server.process_id:
                lines.append((process / "cmdline").read_text())
    assert any("sglang.launch_server" in line for line in lines)
    assert not any("secret" in line for line in lines)
    log = server.spec.log
    assert "server_args=" in log.read_text()
    assert "'secret'" not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_requests_that_can_never_be_served_are_refused(server):
    async def use(client):
        with pytest.raises(RequestError, match=f"do not fit into the model's context of {models.CONTEXT}"):
            await client.generate(request(1, 100, length=models.CONTEXT - 50))
        with pytest.raises(RequestError, match="is not in the model's vocabulary"):
            await client.generate(replace(request(1), tokens=np.array([models.VOCAB], dtype=np.int32)))
        return (await client.generate(request(1, 3))).finish_reason

    assert with_client(server, use) == "length"

    async def told_a_longer_context(client):
        with pytest.raises(RequestError, match=r"refused it: .*longer than the model's context length"):
            await client.generate(request(1, 3, length=models.CONTEXT + 50))

    with_client(server, told_a_longer_context, context=9999)


def test_no_server_is_reachable():
    async def run():
        client = SglangClient(
            ["http://127.0.0.1:9"], context=100, vocab=models.VOCAB, patience_seconds=1.0, look_seconds=0.2
        )
        try:
            with pytest.raises(EngineError, match=r"within 1 s:\nhttp://127.0.0.1:9: .*Cannot connect"):
                await client.generate(request(1, 3))
        finally:
            await client.close()

    asyncio.run(run())


def test_arguments_are_checked_by_name(spec):
    check_arguments(spec)
    wrong = replace(spec, arguments={"tp_sizes": 2, "port": 1, "mem_fraction_static": 0.5})
    with pytest.raises(ValueError, match="tp_size") as raised:
        check_arguments(wrong)
    assert "rollout.sglang.tp_sizes = 2: the installed SGLang has no such argument; did you mean" in str(raised.value)
    assert "rollout.sglang.port = 1: cannot be set here" in str(raised.value)
    assert "mem_fraction_static" not in str(raised.value)
    with pytest.raises(EngineError, match="make sglang-env"):
        check_arguments(replace(spec, python=spec.log))


def test_a_server_that_cannot_start_says_why(spec, tmp_path):
    from fipo_megatron.rollout.sglang.server import SglangServer

    (tmp_path / "config.json").write_text("{}")
    broken = SglangServer(replace(spec, model_path=tmp_path, log=tmp_path / "log"))
    with pytest.raises(EngineError, match="ended while it started") as raised:
        asyncio.run(broken.start())
    assert str(tmp_path / "log") in str(raised.value)
    assert not broken.alive


def test_the_server_refuses_requests_without_the_key(server):
    async def run():
        async with aiohttp.ClientSession() as session, session.get(server.url + "/model_info") as answer:
            return answer.status

    assert asyncio.run(run()) == 401
