"""Servers that answer as a real SGLang server of two tensor-parallel ranks did, and record what is posted to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from transformers import PreTrainedTokenizerBase

from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.server import free_port

RECORDED = json.loads(Path(__file__).with_name("server_of_two_ranks.json").read_text(encoding="utf-8"))
"""``/model_info`` and ``/server_info`` of SGLang 0.5.23 with ``tp_size = 2``: the fields that a run reads."""


class StubServer:
    """A server with the recorded properties.

    Attributes:
        url: Its URL.
        posted: Paths and bodies of what was posted to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, changes: Mapping[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self._tokenizer, self._changes = tokenizer, changes

    async def answer(self, request: web.Request) -> web.Response:
        """Answers as the recorded server."""
        if request.method == "GET":
            return web.json_response(RECORDED[request.path] | self._changes)
        body = await request.json()
        self.posted.append((request.path, body))
        if request.path == "/tokenize":
            return web.json_response({"tokens": self._tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
        return web.json_response({"success": True})


@contextmanager
def stub_servers(tokenizer: PreTrainedTokenizerBase, *changes: Mapping[str, Any]) -> Iterator[list[StubServer]]:
    """Starts a server for each mapping of changed properties; they end with the block."""
    loop = EventLoopThread(name="servers")
    servers = [StubServer(tokenizer, each) for each in changes]

    async def start(server: StubServer) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path}", server.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(server.url.rpartition(":")[2])).start()
        return runner

    runners = [loop.run(start(server)) for server in servers]
    try:
        yield servers
    finally:
        for runner in runners:
            loop.run(runner.cleanup())
        loop.close()
