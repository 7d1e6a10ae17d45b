"""One of two servers is killed under load: every response arrives once, and the server comes back with new weights."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.server_supervisor import ServerSupervisor
from tests.sglang import models
from tests.sglang.test_client import expected, request

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1500)]
REQUESTS = int(os.environ.get("FIPO_SGLANG_REQUESTS", "60"))


def alive(process_id):
    """Returns the ids of running processes of a server's process group."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                state, _, group = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == process_id and state != "Z":
                found.append(int(entry))
    return found


async def until(condition, seconds=240.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def test_every_response_arrives_once(pair, model_path, tmp_path):
    """The first server is killed while it samples; it comes back with older weights than the other one."""
    new_model = models.save(tmp_path / "new", seed=9)
    events, started = [], []

    async def send_current(url):
        """Sends the current weights before the server is used again."""
        assert not [worker for worker in client.pool.alive if worker.url == url]
        payload = {"model_path": str(new_model), "weight_version": "3"}
        await client.control("/update_weights_from_disk", payload, workers=[url])
        events.append(f"updated {url}")
        client.worker_returned(url)

    async def run():
        nonlocal client
        pool = ServerSupervisor(pair, on_restarted=send_current, interval=0.1)
        await pool.start()
        client = SglangClient(
            pool.urls, context=models.CONTEXT, vocab=models.VOCAB, api_key="secret", look_seconds=0.5, concurrency=16
        )
        pool.on_lost = client.worker_lost
        try:
            await client.control("/update_weights_from_disk", {"model_path": str(new_model), "weight_version": "3"})
            client.expect_version(3)
            requests = [request(n, 150 + n % 50) for n in range(REQUESTS)]
            tasks = [asyncio.create_task(client.generate(one)) for one in requests]
            await until(lambda: sum(task.done() for task in tasks) >= 3)
            victim = pair[0].process_id
            lost = len(client.pool.workers[pair[0].url].tasks)
            started.extend(server.starts for server in pair)
            for process in alive(victim):
                os.kill(process, signal.SIGKILL)
            found = await asyncio.gather(*tasks)
            await until(lambda: client.pool.workers[pair[0].url].alive)
            after = await asyncio.gather(*(client.generate(request(n, 10)) for n in range(1000, 1008)))
            return requests, found, lost, after, await client.weight_version()
        finally:
            await client.close()
            await pool.close()

    client = None
    requests, found, lost, after, version = asyncio.run(run())
    assert lost > 0, "nothing was in flight when the server was killed"
    assert len(found) == REQUESTS
    model = models.model(seed=9)
    for one, generation in zip(requests, found, strict=True):
        assert len(generation.tokens) == one.sampling.max_tokens
        assert {span.weight_version for span in generation.spans} == {3}
        np.testing.assert_allclose(generation.log_probs, expected(model, one, generation), atol=1e-4, rtol=0)
    assert events == [f"updated {pair[0].url}"]
    assert (started, [server.starts for server in pair]) == ([1, 1], [2, 1])
    assert version == 3
    assert all(generation.spans[0].weight_version == 3 for generation in after)
    assert not any(server.alive for server in pair)
    print(f"{REQUESTS} requests, {lost} in flight at the server that was killed, all {len(found)} answered once")


def test_requests_fail_in_time_when_all_servers_are_dead(pair):
    """Requests fail with a clear error within ``patience_seconds`` if no restarts are left."""

    async def run():
        pool = ServerSupervisor([replace_log(server) for server in pair[:1]], restarts=0, interval=0.1)
        await pool.start()
        client = SglangClient(
            pool.urls,
            context=models.CONTEXT,
            vocab=models.VOCAB,
            api_key="secret",
            look_seconds=0.3,
            patience_seconds=2.0,
        )
        pool.on_lost = client.worker_lost
        try:
            tasks = [asyncio.create_task(client.generate(request(n, 1500))) for n in range(4)]
            await asyncio.sleep(1.0)
            process_id = pool.servers[0].process_id
            os.killpg(process_id, signal.SIGKILL)
            start = asyncio.get_running_loop().time()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            seconds = asyncio.get_running_loop().time() - start
            return results, seconds, pool.urls[0], process_id
        finally:
            await client.close()
            await pool.close()

    results, seconds, url, process_id = asyncio.run(run())
    for result in results:
        assert isinstance(result, EngineError)
        assert str(result).startswith(f"no SGLang server has come back within 2 s:\n{url}: ")
    assert seconds < 20
    assert not alive(process_id)


def replace_log(server):
    """Returns a server with the same settings and another log, not started."""
    return type(server)(replace(server.spec, log=server.spec.log.with_name("last.log")))
