"""Checks which shapes of a forward pass give a row the same bits.

A matrix product chooses its kernel, and with it the order of its sums, by the number of rows. A pass may therefore be
narrower than the widest one only if that changes no bit of the rows that it has. Whether it does depends on the model's
shapes, the library, the processor and the number of threads, so it is measured with the model itself, once per shape.
"""

from __future__ import annotations

import logging

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

logger = logging.getLogger(__name__)
KEPT_LOGITS = 16
"""Positions at the end of a sequence of which a pass computes logits."""


class PassShapes:
    """Finds the shapes of passes that can replace a larger shape bit for bit.

    A mixture has none: how many rows an expert gets depends on the tokens.

    Args:
        module: A model of transformers.
    """

    def __init__(self, module: transformers.PreTrainedModel) -> None:
        self._module = module
        self._is_mixture = any("experts" in name for name, _ in module.named_modules())
        self._known: dict[tuple[int, int, int], bool] = {}

    def equal(self, rows: int, more_rows: int, length: int) -> bool:
        """Returns whether sequences have the same bits in a pass of ``rows`` as in one of ``more_rows``.

        Args:
            rows: Sequences of the smaller pass.
            more_rows: Sequences of the larger pass.
            length: Tokens of each sequence.
        """
        if rows == more_rows:
            return True
        if self._is_mixture:
            return False
        key = rows, more_rows, length
        if key not in self._known:
            random = torch.Generator().manual_seed(0)
            ids = torch.randint(self._module.config.vocab_size, (more_rows, length), generator=random)
            few, many = read_pass(self._module, ids[:rows]), read_pass(self._module, ids)
            self._known[key] = all(torch.equal(a, b[:rows]) for a, b in zip(few, many, strict=True))
            if not self._known[key]:
                text = "passes of %d sequences round otherwise than passes of %d here (%d tokens each): not used"
                logger.info(text, *key)
        return self._known[key]


@torch.no_grad()
def read_pass(module: transformers.PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Runs a pass over whole sequences, ``[rows, length]`` int64.

    Returns:
        Logits of the last positions, at most :data:`KEPT_LOGITS`, ``[rows, kept, V]``; then keys and values of each
        layer in turn, ``[rows, heads, length, width]``.
    """
    cache = DynamicCache(config=module.config)
    kept = min(KEPT_LOGITS, ids.shape[1])
    found = [module(input_ids=ids.to(module.device), past_key_values=cache, use_cache=True, logits_to_keep=kept).logits]
    for layer in cache.layers:
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        found += [layer.keys, layer.values]
    return found
