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

logger = logging.getLogger(__name__)


class PassShapes:
    """Finds the shapes of passes that can replace a larger shape bit for bit.

    Args:
        module: A model of transformers.
    """

    def __init__(self, module: transformers.PreTrainedModel) -> None:
        self._module = module
        self._known: dict[tuple[int, int, int], bool] = {}

    @torch.no_grad()
    def equal(self, rows: int, more_rows: int, length: int) -> bool:
        """Returns whether sequences have the same logits in a pass of ``rows`` as in one of ``more_rows``.

        Args:
            rows: Sequences of the smaller pass.
            more_rows: Sequences of the larger pass.
            length: Tokens of each sequence.
        """
        key = rows, more_rows, length
        if rows == more_rows:
            return True
        if key not in self._known:
            random = torch.Generator().manual_seed(0)
            ids = torch.randint(self._module.config.vocab_size, (more_rows, length), generator=random)
            few, many = self._logits(ids[:rows]), self._logits(ids)[:rows]
            self._known[key] = torch.equal(few, many)
            if not self._known[key]:
                logger.info(
                    "passes of %d sequences round otherwise than passes of %d here (%d tokens each): not used",
                    *key,
                )
        return self._known[key]

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._module(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits
