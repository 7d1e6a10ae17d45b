"""Sends the weights of an actor of several ranks to a server with each sender; run under torchrun."""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from fipo_megatron.actor import parallel
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import chunk_owners, export_hf, load_hf, save_hf
from fipo_megatron.actor.model import build_model
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.distributed_sender import DistributedSender
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from fipo_megatron.rollout.weight_sync.tensor_sender import TensorSender
from fipo_megatron.weights.architecture import Architecture

PATHS = ("disk", "tensor", "distributed plain", "distributed bucketed")
LAYOUTS = {"TP2": ParallelConfig(tensor_parallel=2), "PP2": ParallelConfig(pipeline_parallel=2)}


def sender_of(path: str, side: ActorWeights, servers: BlockingControlClient, directory: Path) -> Any:
    if path == "disk":
        return DiskSender(side, servers, directory)
    if path == "tensor":
        return TensorSender(side, servers, [1])
    return DistributedSender(side, servers, [1], backend="gloo", flattened=path.endswith("bucketed"))


def probe(url: str, model: transformers.PreTrainedModel) -> tuple[int, float]:
    """Returns the server's weight version, and the largest difference of its log-probs from the model's."""
    from tests.sglang import models
    from tests.sglang.test_client import expected, request

    async def run() -> tuple[int, float]:
        client = SglangClient([url], context=models.CONTEXT, vocab=models.VOCAB, api_key="secret")
        try:
            one = request(11, 30)
            found = await client.generate(one)
            return await client.weight_version(), float(np.abs(found.log_probs - expected(model, one, found)).max())
        finally:
            await client.close()

    return asyncio.run(run())


def main(layout_name: str, url: str, versions: str, directory: str) -> None:
    warnings.simplefilter("ignore")
    layout = parallel.initialize(LAYOUTS[layout_name], seed=1)
    results = []
    for way, (version, source) in zip(PATHS, json.loads(versions).items(), strict=True):
        architecture = Architecture.from_directory(source)
        chunks = build_model(architecture, ActorConfig(dtype="float32", parallel=LAYOUTS[layout_name]), layout)
        load_hf(chunks, architecture, layout, source)
        side = ActorWeights(
            stage=layout.pipeline_rank,
            stages=layout.pipeline_size,
            rank=layout.rank,
            senders=tuple(sorted({*chunk_owners(chunks, layout).values()})),
            stream=lambda on_ranks, c=chunks, a=architecture: export_hf(
                c, a, layout, bucket_bytes=60_000, on_ranks=on_ranks
            ),
            save=lambda target, c=chunks, a=architecture, s=source: save_hf(c, a, layout, s, target),
            together=raise_on_all_ranks,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        moved = probe(url, model)[1] if layout.rank == 0 else 0.0
        sender = sender_of(way, side, BlockingControlClient([url], "secret"), Path(directory))
        sender.send(int(version))
        sender.close()
        if layout.rank == 0:
            served, error = probe(url, model)
            results.append(
                {"path": way, "version": int(version), "served_version": served, "error": error, "moved": moved}
            )
    if layout.rank == 0:
        Path(directory, "results.json").write_text(json.dumps(results))
    parallel.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
