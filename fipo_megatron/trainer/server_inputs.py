"""The servers of a run, checked before Megatron is imported, which takes seconds.

What needs the other ranks is checked when they have met: :mod:`.hosts`.
"""

from __future__ import annotations

import asyncio
import os
import socket

import torch
from transformers import PreTrainedTokenizerBase

from fipo_megatron.actor.launch import Launch, ranks_on_host
from fipo_megatron.config import Config
from fipo_megatron.rollout import engine_factory
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.host_address import host_address, is_asked_for
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, RankGpu, place_servers


def gpu_problem(config: Config) -> str | None:
    """Returns why the servers to start on this host have no GPUs of their own; None if they have, or it is not known.

    It is known under torchrun and for a single process, whose ranks see the same GPUs and take the first ones.
    """
    rollout, ranks = config.rollout, ranks_on_host(os.environ)
    if rollout.engine != "sglang" or rollout.servers.urls or ranks is None or not torch.cuda.is_available():
        return None
    visible, count = os.environ.get(VISIBLE), torch.cuda.device_count()
    if ranks > count:  # the launcher has given each rank its own, or there are too few, which is another error
        return None
    try:
        place_servers(rollout, [RankGpu(index, count, visible) for index in range(ranks)])
    except EngineError as error:
        return _on_this_host(error)
    return None


def check_running_servers(config: Config, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Checks on each rank that running servers can reach it, and on rank 0 that they serve the model.

    Args:
        config: Configuration of the run; without ``rollout.servers.urls`` nothing is checked.
        tokenizer: Tokenizer of the model.
        vocab: Vocabulary size.

    Raises:
        EngineError: This host has no address for the servers, a server cannot be reached, or it serves another model;
            see :func:`.sglang.handshake.handshake`.
    """
    servers = config.rollout.servers
    if config.rollout.engine != "sglang" or not servers.urls:
        return
    if is_asked_for(servers):
        try:
            host_address(servers.interface)
        except EngineError as error:
            raise EngineError(_on_this_host(error)) from None
    if Launch.from_environment(os.environ).rank == 0:
        asyncio.run(engine_factory.check_running_servers(config, tokenizer, vocab))


def _on_this_host(error: EngineError) -> str:
    return f"host {socket.gethostname()}: {error}"
