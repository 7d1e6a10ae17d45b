"""Switches activation recompute off for passes without a backward pass.

A forward-only pass keeps no activations, so recompute saves nothing there. Under delayed FP8 scaling it does harm: each
recomputed region queues its scales for the backward pass (Transformer Engine's
``copy_forward_fp8_meta_tensors_for_recompute``). Those of a forward-only pass stay in the queue, and the next training
pass would recompute its activations with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_FLAG = re.compile(r"recompute|checkpoint_core")
"""Pattern of the attributes in which Megatron-Core's modules store whether they recompute: ``recompute_mlp``,
``moe_layer_recompute``, ``activation_recompute``, ``checkpoint_core_attention`` and others, by version."""


@contextmanager
def recompute_off(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Runs the block without activation recompute, ``full`` or ``selective``, and restores it afterwards.

    Args:
        chunks: Chunks of the model.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    with ExitStack() as restore:
        for config in configs.values():
            if getattr(config, "recompute_granularity", None) == "full":
                _set(restore, config, "recompute_granularity", None)
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is True and _FLAG.search(name)]:
                _set(restore, module, name, False)
        yield


def _set(restore: ExitStack, owner: Any, name: str, value: object) -> None:
    restore.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
