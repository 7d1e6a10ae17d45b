"""The engine in this process: a model of transformers, all requests in one batch, keys and values kept.

For a machine without a GPU, and for tests. What is sampled depends on the weights, the request and its seed alone, not
on what else is in the batch, nor on time: decisions follow counts of tokens, passes always have the same shape, and
every request has random numbers of its own.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from fipo_megatron.rollout.embedded.hf_parameters import parameters_by_hf_name
from fipo_megatron.rollout.embedded.slot_cache import SlotCache
from fipo_megatron.rollout.engine import (
    EngineError,
    EngineMemory,
    Generation,
    GenerationRequest,
    RequestError,
    WorkerHealth,
    spans_of,
)

_PROMPTS_KEPT = 4
_TURNS = 32
"""Turns of the event loop in which all that follows from a response has happened; it takes about eight."""
_VECTOR = 16  # float32 in a vector register of 512 bits


@dataclass(eq=False)
class _Sequence:
    """A request in flight."""

    request: GenerationRequest
    done: asyncio.Future[Generation]
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    aborted: bool = False

    @property
    def everything(self) -> np.ndarray[Any, Any]:
        return np.concatenate([self.request.tokens, np.array(self.tokens, dtype=np.int32)])

    def finish(self, reason: Any) -> None:
        if not self.done.done():
            self.done.set_result(
                Generation(
                    np.array(self.tokens, dtype=np.int32),
                    np.array(self.log_probs, dtype=np.float32),
                    spans_of(self.versions),
                    reason,
                )
            )


class EmbeddedEngine:
    """A :class:`.engine.RolloutEngine` in this process.

    Args:
        path: Directory of a Hugging Face model.
        dtype: Of the weights here.
        slots: Requests that are sampled at a time; others wait in order. A multiple of 16: torch rounds SiLU and others
            differently in what is left over by vector registers, which would then depend on the slot.
        weight_version: Of the weights in ``path``.

    Raises:
        ValueError: such a number of slots.
    """

    def __init__(
        self, path: str | Path, *, dtype: torch.dtype = torch.float32, slots: int = 32, weight_version: int = 0
    ) -> None:
        if slots < 1 or slots % _VECTOR:
            raise ValueError(f"slots = {slots}: must be a multiple of {_VECTOR}")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.model.eval().requires_grad_(False)
        self.context: int = self.model.config.max_position_embeddings
        self.slots = slots
        self._version = weight_version
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence | None] = [None] * slots
        self._cache: SlotCache | None = None
        self._prompts: OrderedDict[bytes, tuple[DynamicCache, Tensor]] = OrderedDict()
        self._stale = self._closed = self._weightless = False
        self._shapes: list[torch.Size] = []
        self._deciding = self._decisions = 0
        self._decided = asyncio.Event()
        self._last_decision: asyncio.Event | None = None
        self._going = asyncio.Event()
        self._going.set()
        self._task: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Generation:
        """See :class:`.engine.RolloutEngine`."""
        if self._closed:
            raise EngineError("the embedded engine is closed")
        self._check(request)
        sequence = _Sequence(
            request, asyncio.get_running_loop().create_future(), np.random.Generator(np.random.Philox(request.seed))
        )
        self._waiting.append(sequence)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await sequence.done

    def _check(self, request: GenerationRequest) -> None:
        length, more = len(request.tokens), request.sampling.max_tokens
        if length < 1:
            raise RequestError(f"request {request.id}: has no tokens")
        if length + more > self.context:
            raise RequestError(
                f"request {request.id}: {length} tokens and max_tokens = {more} do not fit into the model's context "
                f"of {self.context}"
            )
        if (largest := int(request.tokens.max())) >= self.model.config.vocab_size or int(request.tokens.min()) < 0:
            raise RequestError(f"request {request.id}: token {largest} is not in the model's vocabulary")

    async def _run(self) -> None:
        """Passes through the model as long as there is something to sample."""
        try:
            while self._waiting or any(self._running):
                self._end_aborted()
                if not self._going.is_set():
                    await self._pause_or_abort()
                    continue
                if not any(self._running):
                    await _turns()  # all that is asked for at a time begins at a time
                    self._end_aborted()
                if self._weightless:
                    raise EngineError("the weights were released; restore and update them before generating")
                self._admit()
                finished = self._sample()
                self._decode()
                await self._until_decided() if finished else await asyncio.sleep(0)
        except BaseException as error:
            for sequence in [*self._waiting, *filter(None, self._running)]:
                if not sequence.done.done():
                    sequence.done.set_exception(error)
            self._waiting.clear()
            self._running = [None] * self.slots
            if not isinstance(error, Exception):
                raise

    async def _until_decided(self) -> None:
        """Whoever waited for a response has had its turn, and decided what follows: else that would depend on time."""
        await _turns()
        seen = self._decisions if not self._deciding else -1
        while self._deciding or seen != self._decisions:  # the turns are counted from the last one
            if self._deciding:
                self._decided.clear()
                await self._decided.wait()
            seen = self._decisions
            await _turns()

    @asynccontextmanager
    async def deciding(self) -> AsyncIterator[None]:
        """See :class:`.engine.RolloutEngine`."""
        before, mine = self._last_decision, asyncio.Event()
        self._last_decision = mine
        self._deciding += 1
        try:
            yield
            if before is not None:
                await before.wait()
        finally:
            mine.set()
            self._deciding -= 1
            self._decisions += 1
            self._decided.set()

    async def _pause_or_abort(self) -> None:
        """While paused, requests can still be aborted."""
        self._aborting = asyncio.Event()
        waits = [asyncio.create_task(event.wait()) for event in (self._going, self._aborting)]
        _, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in left:
            wait.cancel()

    def _end_aborted(self) -> None:
        for sequence in [*self._waiting, *filter(None, self._running)]:
            if sequence.aborted or sequence.done.cancelled():
                sequence.finish("abort")
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.done.done())
        self._running = [None if s is None or s.done.done() else s for s in self._running]

    @torch.no_grad()
    def _admit(self) -> None:
        """Fills free slots with what waits; after an update of the weights, reads all running sequences again."""
        if self._cache is None:
            self._cache = SlotCache(self.model.config.num_hidden_layers, self.slots)
        for slot, sequence in enumerate(self._running):
            if sequence is None and self._waiting:
                self._running[slot] = new = self._waiting.popleft()
                self._read(slot, new)
            elif sequence is not None and self._stale:
                self._read(slot, sequence)
        self._stale = False

    def _read(self, slot: int, sequence: _Sequence) -> None:
        """One sequence in a pass of its own; a prompt that was just read is not read again."""
        assert self._cache is not None
        tokens = sequence.everything
        key = tokens.tobytes()
        if key in self._prompts:
            self._prompts.move_to_end(key)
        else:
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            cache = DynamicCache(config=self.model.config)
            found = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._prompts[key] = cache, found.logits[0, -1]
            while len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        cache, sequence.logits = self._prompts[key]
        self._cache.put(slot, cache, len(tokens))

    def _sample(self) -> bool:
        """One token for every running sequence; whether any is finished by it."""
        finished = False
        for slot, sequence in enumerate(self._running):
            if sequence is None:
                continue
            assert sequence.logits is not None
            sampling = sequence.request.sampling
            log_probs = torch.log_softmax(sequence.logits.double() / sampling.temperature, -1)
            token = draw(log_probs.numpy(), sampling.top_p, sequence.random.random())
            sequence.tokens.append(token)
            sequence.log_probs.append(float(log_probs[token]))
            sequence.versions.append(self._version)
            stopped = token in sampling.stop_token_ids
            if stopped or len(sequence.tokens) == sampling.max_tokens:
                sequence.finish("stop" if stopped else "length")
                self._running[slot], finished = None, True
        return finished

    @torch.no_grad()
    def _decode(self) -> None:
        """A pass with one row per slot, whether it is in use or not."""
        if not any(self._running):
            return
        assert self._cache is not None
        ids, positions = torch.zeros(2, self.slots, dtype=torch.int64)
        for slot, sequence in enumerate(self._running):
            if sequence is not None:
                ids[slot] = sequence.tokens[-1]
                positions[slot] = len(sequence.request.tokens) + len(sequence.tokens) - 1
        found = self.model(
            input_ids=ids[:, None],
            position_ids=positions[:, None],
            attention_mask=self._cache.advance(positions),
            past_key_values=self._cache,
            use_cache=True,
        )
        for slot, sequence in enumerate(self._running):
            if sequence is not None:
                sequence.logits = found.logits[slot, -1]

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """See :class:`.engine.RolloutEngine`."""
        for sequence in [*self._waiting, *filter(None, self._running)]:
            sequence.aborted |= ids is None or sequence.request.id in ids
        if hasattr(self, "_aborting"):
            self._aborting.set()

    async def pause(self) -> None:
        """See :class:`.engine.RolloutEngine`."""
        self._going.clear()

    async def resume(self) -> None:
        """See :class:`.engine.RolloutEngine`."""
        self._going.set()

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes new weights between two passes; requests in flight go on with them, their keys and values read again.

        Args:
            tensors: Hugging Face names (one per expert, as on disk) and whole tensors; all of them, in any order.
            version: Of these weights.

        Raises:
            EngineError: names or shapes are not the model's, or some are missing; the engine must not be used then.
        """
        mine = parameters_by_hf_name(self.model)
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
            self._weightless = True
            raise EngineError("weights that do not fit the embedded engine's model:\n" + "\n".join(problems))
        self._version, self._stale, self._weightless = version, True, False
        self._prompts.clear()

    async def release_memory(self, *what: EngineMemory) -> None:
        """See :class:`.engine.RolloutEngine`."""
        if self._waiting or any(self._running):
            raise EngineError("release_memory: requests are in flight; abort them or let them end")
        if "kv_cache" in what:
            self._cache = None
            self._prompts.clear()
        if "weights" in what and not self._weightless:
            self._shapes = [parameter.shape for parameter in self.model.parameters()]
            for parameter in self.model.parameters():
                parameter.data = parameter.new_empty(0)
            self._weightless = True

    async def restore_memory(self, *what: EngineMemory) -> None:
        """See :class:`.engine.RolloutEngine`."""
        if "weights" in what and self._shapes:
            for parameter, shape in zip(self.model.parameters(), self._shapes, strict=True):
                parameter.data = parameter.new_empty(shape)
            self._shapes = []

    async def weight_version(self) -> int:
        """See :class:`.engine.RolloutEngine`."""
        return self._version

    async def health(self) -> tuple[WorkerHealth, ...]:
        """See :class:`.engine.RolloutEngine`."""
        running = len(self._waiting) + sum(sequence is not None for sequence in self._running)
        return (WorkerHealth("embedded", not self._closed, self._version, running),)

    async def close(self) -> None:
        """See :class:`.engine.RolloutEngine`."""
        self._closed = True
        await self.abort()
        await self.resume()
        if self._task is not None:
            await self._task


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def draw(log_probs: np.ndarray[Any, Any], top_p: float, uniform: float) -> int:
    """The token at ``uniform`` of the cumulative distribution, tokens in the order of their ids.

    Args:
        log_probs: ``[V]`` float64, normalised.
        top_p: Only the most probable tokens that together have at least this are drawn, at least one; ties go to
            smaller ids.
        uniform: In [0, 1).
    """
    probabilities = np.exp(log_probs)
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
        outside = order[kept:]
        probabilities[outside] = 0
    cumulative = np.cumsum(probabilities)
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(token, int(np.flatnonzero(probabilities)[-1]))  # rounding may leave the last one short


def weights_of(model: transformers.PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors that :meth:`EmbeddedEngine.update_weights` takes, of a model of transformers."""
    return parameters_by_hf_name(model)
