"""SGLang's router in front of two servers: requests are sent to it, control calls to each server."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.server import SglangServer, free_port
from tests.sglang import models
from tests.sglang.test_client import expected, request

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


@contextlib.contextmanager
def router(spec, urls):
    """Starts a router; yields its URL and process."""
    port = free_port("127.0.0.1")
    command = [
        *(str(spec.python), "-m", "sglang_router.launch_router", "--worker-urls", *urls),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port("127.0.0.1"))),
        *("--policy", "round_robin", "--api-key", "secret", "--retry-max-retries", "1"),
    ]
    with spec.log.with_name("router.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                asked = urllib.request.Request(url + "/workers", headers={"Authorization": "Bearer secret"})
                with urllib.request.urlopen(asked, timeout=5) as answer:
                    if answer.read().count(b"http://127.0.0.1") >= len(urls):
                        break
            assert process.poll() is None, spec.log.with_name("router.log").read_text()[-3000:]
            assert time.monotonic() < end, spec.log.with_name("router.log").read_text()[-3000:]
            time.sleep(0.3)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_requests_through_a_router(server, spec, tmp_path):
    """Both servers are used and receive weights and aborts. No response is lost when a server dies, then the router."""
    second = SglangServer(replace(spec, log=spec.log.with_name("second.log")))
    new_model = models.save(tmp_path / "new", seed=4)

    async def run(url, process):
        client = SglangClient(
            [server.url, second.url],
            router=url,
            context=models.CONTEXT,
            vocab=models.VOCAB,
            api_key="secret",
            look_seconds=0.5,
            patience_seconds=3.0,
        )
        try:
            await client.control("/update_weights_from_disk", {"model_path": str(new_model), "weight_version": "5"})
            client.expect_version(5)
            requests = [request(n, 30) for n in range(12)]
            found = await asyncio.gather(*(client.generate(one) for one in requests))
            used = await client.look_up("/server_info")
            tasks = [asyncio.create_task(client.generate(request(n, 1900))) for n in range(100, 104)]
            await asyncio.sleep(1.0)
            await client.abort()
            aborted = await asyncio.gather(*tasks)
            tasks = [asyncio.create_task(client.generate(request(n, 300))) for n in range(200, 208)]
            await asyncio.sleep(0.7)
            await second.stop()
            after = await asyncio.gather(*tasks)
            os.killpg(process.pid, signal.SIGKILL)
            with pytest.raises(EngineError, match=r"the router http.* did not serve request 300/0 within 3 s"):
                await client.generate(request(300, 30))
            first = {"model_path": str(spec.model_path), "weight_version": "0"}
            await client.control("/update_weights_from_disk", first, workers=[server.url])
            return requests, found, used, aborted, after, await client.health()
        finally:
            await client.close()

    asyncio.run(second.start())
    try:
        with router(spec, [server.url, second.url]) as (url, process):
            requests, found, used, aborted, after, health = asyncio.run(run(url, process))
    finally:
        asyncio.run(second.stop())
    model = models.model(seed=4)
    for one, generation in zip(requests, found, strict=True):
        np.testing.assert_allclose(generation.log_probs, expected(model, one, generation), atol=1e-4, rtol=0)
        assert generation.spans[0].weight_version == 5
    assert len(used) == 2
    assert all(generation.finish_reason == "abort" and len(generation.tokens) < 1900 for generation in aborted)
    assert all(len(generation.tokens) == 300 for generation in after)
    assert [worker.alive for worker in health] == [True, False]
    for url_ in (server.url, second.url):
        log = (spec.log if url_ == server.url else spec.log.with_name("second.log")).read_text()
        assert log.count("POST /generate") >= 4
