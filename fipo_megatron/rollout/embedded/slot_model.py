"""A model of transformers with one sequence per slot: its weights, its forward passes and its KV cache.

Every sequence is read in a pass of its own. After that, all slots get their next token in one pass of a fixed shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fipo_megatron.rollout.embedded.hf_parameters import parameters_by_hf_name
from fipo_megatron.rollout.embedded.slot_cache import SlotCache
from fipo_megatron.rollout.engine import EngineError, EngineMemory

_PROMPTS_KEPT = 4


class SlotModel:
    """A model whose passes have one row per slot.

    Args:
        path: Directory of a Hugging Face model.
        dtype: Data type of the weights.
        slots: Number of slots.
        version: Version of the weights in ``path``.

    Attributes:
        module: The model of transformers.
        version: Version of the weights.
        usable: Whether the weights are complete.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, slots: int, version: int) -> None:
        self.module = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        )
        self.module.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.module.requires_grad_(False)
        self.version = version
        self.usable = True
        self._slots = slots
        self._cache: SlotCache | None = None
        self._prompts: OrderedDict[bytes, tuple[DynamicCache, Tensor]] = OrderedDict()
        """Keys, values and last logits of the sequences that were read last, by their tokens."""
        self._released: list[torch.Size] = []
        """Shapes of the weights while they are released."""

    @torch.no_grad()
    def read(self, slot: int, tokens: NDArray[np.int32]) -> Tensor:
        """Reads a sequence into a slot, in a pass of its own unless the same tokens were just read.

        Args:
            slot: Number of the slot.
            tokens: ``[P]`` int32.

        Returns:
            Logits of the next token, ``[V]``.
        """
        if self._cache is None:
            self._cache = SlotCache(self.module.config.num_hidden_layers, self._slots)
        key = tokens.tobytes()
        if key in self._prompts:
            self._prompts.move_to_end(key)
        else:
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            cache = DynamicCache(config=self.module.config)
            found = self.module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._prompts[key] = cache, found.logits[0, -1]
            while len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        cache, logits = self._prompts[key]
        self._cache.put(slot, cache, len(tokens))
        return logits

    @torch.no_grad()
    def decode(self, last_tokens: Mapping[int, tuple[int, int]]) -> Tensor:
        """Runs a pass over one token per slot; unused slots are rows, too.

        Args:
            last_tokens: Last token of each slot in use and its position in the sequence, by slot.

        Returns:
            Logits of the next tokens, ``[slots, V]``; rows of unused slots have no meaning.
        """
        assert self._cache is not None
        ids, positions = torch.zeros(2, self._slots, dtype=torch.int64)
        for slot, (token, position) in last_tokens.items():
            ids[slot], positions[slot] = token, position
        found = self.module(
            input_ids=ids[:, None],
            position_ids=positions[:, None],
            attention_mask=self._cache.advance(positions),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies new weights into the model and forgets the sequences that were read with the old ones.

        Args:
            tensors: Hugging Face names (one per expert, as on disk) and whole tensors; all of them, in any order.
            version: Version of these weights.

        Raises:
            EngineError: names or shapes are not the model's, or some are missing; the model is not usable then.
        """
        mine = parameters_by_hf_name(self.module)
        problems = []
        for name, tensor in tensors:
            target = mine.pop(name, None)
            if target is None or target.shape != tensor.shape:
                shape = "no such tensor, or twice" if target is None else f"shape {list(target.shape)} here"
                problems.append(f"{name} {list(tensor.shape)}: {shape}")
            else:
                target.copy_(tensor)
        problems += [f"{name}: missing" for name in mine]
        if problems:
            self.usable = False
            raise EngineError("weights that do not fit the embedded engine's model:\n" + "\n".join(problems))
        self.version, self.usable = version, True
        self._prompts.clear()

    def release(self, *what: EngineMemory) -> None:
        """Frees the KV cache, the weights, or both."""
        if "kv_cache" in what:
            self._cache = None
            self._prompts.clear()
        if "weights" in what and self.usable:
            self._released = [parameter.shape for parameter in self.module.parameters()]
            for parameter in self.module.parameters():
                parameter.data = parameter.new_empty(0)
            self.usable = False

    def restore(self, *what: EngineMemory) -> None:
        """Allocates the weights again; they must be updated before use. The KV cache is allocated when it is used."""
        if "weights" in what and self._released:
            for parameter, shape in zip(self.module.parameters(), self._released, strict=True):
                parameter.data = parameter.new_empty(shape)
            self._released = []
