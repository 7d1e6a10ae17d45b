"""A model of transformers with one sequence per slot: its weights, its forward passes and its KV cache.

A sequence is read first (:mod:`.sequence_reader`). After that, the lower slots get their next tokens in one pass, which
has as many rows as are in use, rounded up to one of a few widths that give each row the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from fipo_megatron.rollout.embedded.hf_parameters import parameters_by_hf_name
from fipo_megatron.rollout.embedded.pass_shapes import PassShapes
from fipo_megatron.rollout.embedded.recorded_pass import RecordedPasses
from fipo_megatron.rollout.embedded.sequence_reader import SequenceReader
from fipo_megatron.rollout.embedded.slot_cache import SlotCache
from fipo_megatron.rollout.engine import EngineError, EngineMemory

VECTOR = 16
"""Rows of a pass are a multiple of this number of float32 in a vector register of 512 bits.

torch rounds SiLU and other functions differently in the remainder of a vector register.
"""


class SlotModel:
    """A model whose passes have one row for each of the lower slots.

    Args:
        path: Directory of a Hugging Face model.
        dtype: Data type of the weights.
        slots: Number of slots.
        version: Version of the weights in ``path``.
        device: Device of the weights, the passes and the KV cache.

    Attributes:
        module: The model of transformers.
        version: Version of the weights.
        usable: Whether the weights are complete.
    """

    def __init__(
        self, path: str | Path, dtype: torch.dtype, slots: int, version: int, device: torch.device | str = "cpu"
    ) -> None:
        self.module = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        )
        self.module.to(torch.device(device))  # type: ignore[arg-type]  # the wrapper of transformers hides self
        self.module.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.module.requires_grad_(False)
        self.version = version
        self.usable = True
        self._slots = slots
        self._cache: SlotCache | None = None
        self._logits = torch.empty(0)
        """Logits of the next token of each slot."""
        self._shapes = PassShapes(self.module)
        self._reader = SequenceReader(self.module, self._shapes)
        model = weakref.proxy(self)  # without a cycle, so that a model that is dropped frees its memory at once
        self._pass = RecordedPasses(lambda *inputs: model._decode(*inputs))
        self._released: list[torch.Size] = []
        """Shapes of the weights while they are released."""

    @torch.no_grad()
    def read(self, sequences: Mapping[int, NDArray[np.int32]]) -> None:
        """Reads sequences into slots; :meth:`next_logits` returns their next logits.

        Args:
            sequences: ``[P]`` int32 by slot.
        """
        cache = self._allocated()
        slots = list(sequences)
        for places, read in self._reader.read(list(sequences.values())):
            equal = [slots[place] for place in places]
            cache.put(equal, read.layers)
            self._logits[equal] = read.logits

    def decode(self, slots: NDArray[np.int64], tokens: NDArray[np.int32], positions: NDArray[np.int64]) -> None:
        """Runs a pass over one token per slot; :meth:`next_logits` returns the logits. Unused slots are rows, too.

        Args:
            slots: Slots in use, below :meth:`width` for their number, which is the number of rows of the pass.
            tokens: Last token of each of them.
            positions: Position of this token in its sequence.
        """
        width = self.width(len(slots))
        ids, places = torch.zeros(2, width, dtype=torch.int64)
        ids.numpy()[slots], places.numpy()[slots] = tokens, positions
        cache = self._allocated()
        mask = cache.advance(places)
        self._logits[:width] = self._pass(ids.to(cache.device), cache.positions, mask)

    def _decode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Computes the logits of the next tokens, ``[rows, V]``, of ``[rows]`` tokens and positions.

        ``mask`` is that of :meth:`.SlotCache.advance`, whose shape also says how many positions are read.
        """
        assert self._cache is not None
        self._cache.positions = positions
        found = self.module(
            input_ids=ids[:, None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def width(self, running: int) -> int:
        """Returns the number of rows of a pass over this number of sequences: 16, 32, 64, ... or all slots."""
        width = VECTOR
        while width < running or not self._shapes.equal(min(width, self._slots), self._slots, 1):
            width *= 2
        return min(width, self._slots)

    def move(self, slots: Mapping[int, int], length: int) -> None:
        """Moves sequences of at most ``length`` tokens from the keys of a mapping to its values, which are free."""
        self._allocated().move(slots, length)

    def next_logits(self, slots: NDArray[np.int64]) -> Tensor:
        """Returns the logits of the next tokens of these slots, ``[slots, V]``, on the CPU."""
        return self._logits[torch.from_numpy(slots)].cpu()

    def _allocated(self) -> SlotCache:
        if self._cache is None:
            layers, dtype, device = self.module.config.num_hidden_layers, self.module.dtype, self.module.device
            self._cache = SlotCache(layers, self._slots, dtype, device, self._pass.forget)
            self._logits = torch.empty(self._slots, self.module.config.vocab_size, dtype=dtype, device=device)
        return self._cache

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
        self._reader.forget()

    def release(self, *what: EngineMemory) -> None:
        """Frees the KV cache, the weights, or both."""
        self._pass.forget()  # it holds both
        if "kv_cache" in what:
            self._cache, self._logits = None, torch.empty(0)
            self._reader.forget()
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
