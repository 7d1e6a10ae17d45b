"""Benchmarks of rollouts: tokens per second of both engines, seconds per weight sender, and the client alone.

The model is tiny and runs on this machine's cores, so the overhead of the engines is compared. For the client alone, a
server in another process returns 1,000 prepared responses of 20,000 tokens.

    python -m benchmarks.rollout
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from benchmarks.result_table import print_table, write_result
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.sglang.server import ServerSpec, SglangServer, free_port
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.distributed_sender import DistributedSender
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from fipo_megatron.rollout.weight_sync.tensor_sender import TensorSender
from tests.sglang import models

TOKENS = 200
BATCHES = (1, 8, 32)
RESPONSES, RESPONSE_TOKENS = 1000, 20_000
PYTHON = Path(__file__).parents[1] / ".venv-sglang" / "bin" / "python"


def request(number: int, tokens: int = TOKENS) -> GenerationRequest:
    prompt = np.random.default_rng(number).integers(2, models.VOCAB, 50).astype(np.int32)
    return GenerationRequest(str(number), str(number), prompt, SamplingParameters(1.0, tokens), number)


async def rates(engine: RolloutEngine) -> dict[int, float]:
    """Returns sampled tokens per second by batch size; the best of three."""
    found = {}
    for batch in BATCHES:
        times = []
        for turn in range(3):
            start = time.perf_counter()
            await asyncio.gather(*(engine.generate(request(1000 * turn + n)) for n in range(batch)))
            times.append(time.perf_counter() - start)
        found[batch] = batch * TOKENS / min(times)
    return found


async def sglang(path: Path, log: Path) -> tuple[dict[int, float], dict[str, float]]:
    arguments = {"dtype": "float32", "max_total_tokens": 32768}
    server = SglangServer(ServerSpec(PYTHON, path, log, arguments, {"OMP_NUM_THREADS": "1"}, cpu=True))
    await server.start()
    client = SglangClient([server.url], context=models.CONTEXT, vocab=models.VOCAB)
    try:
        tokens = await rates(client)
        return tokens, await asyncio.to_thread(sync_seconds, server.url, path)
    finally:
        await client.close()
        await server.stop()


def sync_seconds(url: str, path: Path) -> dict[str, float]:
    """Returns the median seconds of five updates with each sender; the tensors are prepared."""
    tensors = [(name, tensor.clone()) for name, tensor in weights_of(models.model()).items()]

    def save(target: Path) -> None:
        models.save(target)

    side = ActorWeights(0, 1, 0, (0,), lambda _: iter([tensors]), save, lambda _: contextlib.nullcontext())
    found = {}

    def servers() -> BlockingControlClient:
        return BlockingControlClient([url])

    with tempfile.TemporaryDirectory() as directory:
        for name, sender in (
            ("disk", DiskSender(side, servers(), Path(directory))),
            ("tensor", TensorSender(side, servers(), [1])),
            ("distributed plain", DistributedSender(side, servers(), [1], backend="gloo", flattened=False)),
            ("distributed bucketed", DistributedSender(side, servers(), [1], backend="gloo")),
        ):
            times = []
            for version in range(5):
                start = time.perf_counter()
                sender.send(version)
                times.append(time.perf_counter() - start)
            sender.close()
            found[name] = float(np.median(times))
    return found


def answer_for_ever(port: int) -> None:
    """Runs a server that always returns the same answer."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 150_000, RESPONSE_TOKENS).tolist()
    log_probs = [
        [-float(value), token, None] for value, token in zip(generator.random(RESPONSE_TOKENS), ids, strict=True)
    ]
    meta = {
        "finish_reason": {"type": "length", "length": RESPONSE_TOKENS},
        "weight_versions": [{"version": "0", "start": 0, "end": RESPONSE_TOKENS}],
        "output_token_logprobs": log_probs,
    }
    body = json.dumps({"text": "x" * 60_000, "output_ids": ids, "meta_info": meta}).encode()

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", handle)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


async def client_alone(url: str) -> dict[str, float]:
    """Returns the seconds, the stalls of the event loop and the growth of this process."""
    client = SglangClient([url], context=1 << 20, vocab=1 << 20, look_seconds=3600)
    stalls: list[float] = []

    async def tick() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            stalls.append(time.perf_counter() - start - 0.001)

    for _ in range(100):
        try:
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            break
        except OSError:
            await asyncio.sleep(0.1)
    await client.generate(request(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ticker = asyncio.create_task(tick())
    start = time.perf_counter()
    found = await asyncio.gather(*(client.generate(request(n, RESPONSE_TOKENS)) for n in range(RESPONSES)))
    seconds = time.perf_counter() - start
    ticker.cancel()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    kept = sum(one.tokens.nbytes + one.log_probs.nbytes for one in found)
    await client.close()
    return {
        "seconds": seconds,
        "stall_median": float(np.median(stalls)),
        "stall_p99": float(np.quantile(stalls, 0.99)),
        "grown_bytes": grown,
        "kept_bytes": kept,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = models.save(Path(directory) / "model")
        embedded = asyncio.run(rates(EmbeddedEngine(path)))
        served, sync = asyncio.run(sglang(path, Path(directory) / "log"))
    print_table(
        f"Sampled tokens per second, {TOKENS} tokens each",
        [
            {"batch": str(batch), "embedded": f"{embedded[batch]:.0f}", "SGLang": f"{served[batch]:.0f}"}
            for batch in BATCHES
        ],
    )
    print_table(
        "Seconds to send the tiny model", [{"way": name, "seconds": f"{value:.3f}"} for name, value in sync.items()]
    )
    port = free_port("127.0.0.1")
    server = multiprocessing.get_context("spawn").Process(target=answer_for_ever, args=(port,), daemon=True)
    server.start()
    alone: dict[str, Any] = asyncio.run(client_alone(f"http://127.0.0.1:{port}"))
    server.kill()
    print_table(
        f"The client alone: {RESPONSES} responses of {RESPONSE_TOKENS} tokens",
        [
            {
                "seconds": f"{alone['seconds']:.1f}",
                "ms each": f"{1000 * alone['seconds'] / RESPONSES:.1f}",
                "stall, median ms": f"{1000 * alone['stall_median']:.1f}",
                "stall, 99 % ms": f"{1000 * alone['stall_p99']:.1f}",
                "grown MB": f"{alone['grown_bytes'] / 1e6:.0f}",
                "of it kept MB": f"{alone['kept_bytes'] / 1e6:.0f}",
            }
        ],
    )
    write_result(
        "rollout",
        {"tokens_per_second": {"embedded": embedded, "sglang": served}, "sync_seconds": sync, "client": alone},
    )


if __name__ == "__main__":
    main()
