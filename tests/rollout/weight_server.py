"""A stand-in for an SGLang server that receives flattened float32 weights by broadcast over gloo.

It runs in a process of its own, so that it can die within a broadcast. It answers with the sums of its weights.
"""

from __future__ import annotations

import asyncio
import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from torch.distributed import distributed_c10d

LIMIT = timedelta(seconds=60)


class WeightServer:
    """One server.

    Args:
        dies: Number of the bucket during whose broadcast its process ends; 0: never.
    """

    def __init__(self, dies: int) -> None:
        self.dies, self.buckets, self.version = dies, 0, "0"
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.weights: dict[str, float] = {}
        self.busy = asyncio.Lock()  # as one scheduler does one thing after the other

    def join(self, asked: dict[str, Any]) -> None:
        address, port, world = asked["master_address"], asked["master_port"], asked["world_size"]
        store = dist.PrefixStore(
            name := asked["group_name"], dist.TCPStore(address, port, world, is_master=False, timeout=LIMIT)
        )
        self.groups[name], _ = distributed_c10d._new_process_group_helper(
            world, asked["rank_offset"], [], dist.Backend("gloo"), store, group_name=name, timeout=LIMIT
        )

    def receive(self, asked: dict[str, Any]) -> None:
        self.buckets += 1
        if self.buckets == self.dies:
            os._exit(1)
        received = torch.empty(sum(math.prod(shape) for shape in asked["shapes"]))
        self.groups[asked["group_name"]].broadcast(received.view(torch.uint8), 0).wait()
        parts = received.split([math.prod(shape) for shape in asked["shapes"]])
        self.weights |= {name: float(part.sum()) for name, part in zip(asked["names"], parts, strict=True)}

    async def answer(self, request: web.Request) -> web.Response:
        asked = await request.json() if request.can_read_body else {}
        async with self.busy:
            match request.path:
                case "/init_weights_update_group":
                    await asyncio.to_thread(self.join, asked)
                case "/update_weights_from_distributed":
                    await asyncio.to_thread(self.receive, asked)
                case "/destroy_weights_update_group":
                    self.groups.pop(asked["group_name"])
                case "/update_weight_version":
                    self.version = asked["new_version"]
        return web.json_response({"weight_version": self.version, "weights": self.weights})


def main(port: int, dies: int) -> None:
    server = WeightServer(dies)
    app = web.Application()
    app.router.add_route("*", "/{path}", server.answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None)
