"""The rollout engine in the trainer's own process: a model of transformers, all requests in one batch.

For machines without a GPU, and for tests. What is sampled depends only on the weights, the request and its seed, not on
the rest of the batch or on time: passes have shapes that give a row the same bits, every request has its own random
numbers, and the engine samples a token only when its driver has made all decisions on what was returned
(:mod:`.turn_taking`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from fipo_megatron.data.trajectory import FinishReason
from fipo_megatron.observe import progress
from fipo_megatron.rollout.embedded.drawing import TwoModelRule, draw_from_one
from fipo_megatron.rollout.embedded.hf_parameters import parameters_by_hf_name
from fipo_megatron.rollout.embedded.slot_model import VECTOR, SlotModel
from fipo_megatron.rollout.embedded.slot_table import SlotTable
from fipo_megatron.rollout.embedded.turn_taking import TurnTaking
from fipo_megatron.rollout.engine import (
    EngineError,
    EngineMemory,
    Generation,
    GenerationRequest,
    WorkerHealth,
    check_request,
)

_DRAWN_ELEMENTS = 1 << 21
"""Logits of a draw in float64, 16 MiB; more sequences are drawn in turn."""
_TURNS_TO_VERIFIER = 3
"""Turns of the event loop in which a response that has ended reaches the process of a verifier.

It is checked there while the next pass runs here.
"""
_NOTHING = Generation(np.empty(0, np.int32), np.empty(0, np.float32), (), "abort")


@dataclass(eq=False)
class _Sequence:
    """A request in flight."""

    request: GenerationRequest
    done: asyncio.Future[Generation]
    aborted: bool = False


class EmbeddedEngine:
    """A :class:`.engine.RolloutEngine` in this process.

    Args:
        path: Directory of a Hugging Face model.
        dtype: Data type of the engine's weights.
        slots: Most requests that are sampled at the same time; others wait in order. Must be a multiple of 16, see
            :data:`.slot_model.VECTOR`. Slots that are not in use cost memory only.
        weight_version: Version of the weights in ``path``.
        device: Device of the models; tokens are drawn on the CPU.
        second: A second model with the same vocabulary, and the rule by which tokens are drawn from both; None draws
            from the one in ``path``.
        entropy_at: Factors of each request's temperature at which the entropy of the distribution that its tokens are
            drawn from is measured, as ``Generation.quantities``.

    Attributes:
        model: The model of transformers.
        rule: Rule of the two models; may be replaced by another one while no request is in flight.
        context: Tokens that a prompt and its response may have together.

    Raises:
        ValueError: ``slots`` is not a multiple of 16.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        slots: int = 32,
        weight_version: int = 0,
        device: torch.device | str = "cpu",
        second: tuple[str | Path, TwoModelRule] | None = None,
        entropy_at: Sequence[float] = (),
    ) -> None:
        if slots < 1 or slots % VECTOR:
            raise ValueError(f"slots = {slots}: must be a multiple of {VECTOR}")
        self._model = SlotModel(path, dtype, slots, weight_version, device)
        self._models, self.rule = [self._model], second[1] if second is not None else None
        if second is not None:
            self._models.append(SlotModel(second[0], dtype, slots, weight_version, device))
        self._entropy_at = tuple(entropy_at)
        self.model = self._model.module
        self.context: int = self.model.config.max_position_embeddings
        self.slots = slots
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence | None] = [None] * slots
        self._table = SlotTable(slots, len(self._models))
        self._outdated = self._closed = False
        self._some_ended = False
        """Whether a request in flight was aborted or cancelled."""
        self._turns = TurnTaking()
        self._going = asyncio.Event()
        self._going.set()
        self._aborting = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response; see :meth:`.engine.RolloutEngine.generate`."""
        if self._closed:
            raise EngineError("the embedded engine is closed")
        check_request(request, self.context, self.model.config.vocab_size)
        sequence = _Sequence(request, asyncio.get_running_loop().create_future())
        self._turns.hand_over()
        self._waiting.append(sequence)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            return await sequence.done
        except asyncio.CancelledError:
            self._some_ended = True
            raise

    async def _run(self) -> None:
        """Runs passes through the model while there is anything to sample."""
        try:
            while self._waiting or any(self._running):
                self._end_aborted()
                if not self._going.is_set():
                    await self._until_resumed_or_aborted()
                    continue
                if not self._turns.is_engines_turn:
                    await self._turns.wait_for_driver()
                    continue
                if not all(model.usable for model in self._models):
                    raise EngineError("the weights were released; restore and update them before generating")
                self._admit()
                ended = self._sample()
                for _ in range(_TURNS_TO_VERIFIER if ended else 1):
                    await asyncio.sleep(0)  # lets the other tasks of the event loop run
                if self._outdated:
                    continue  # new weights came meanwhile: all sequences are read again
                self._decode()
                progress.sign()
        except BaseException as error:
            for sequence in self._in_flight():
                if not sequence.done.done():
                    sequence.done.set_exception(error)
            self._waiting.clear()
            self._running = [None] * self.slots
            self._table = SlotTable(self.slots, len(self._models))
            if not isinstance(error, Exception):
                raise

    def _in_flight(self) -> list[_Sequence]:
        return [*self._waiting, *(sequence for sequence in self._running if sequence is not None)]

    async def _until_resumed_or_aborted(self) -> None:
        """Waits while paused; requests can be aborted meanwhile."""
        self._aborting.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._going, self._aborting)]
        _, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in left:
            wait.cancel()

    def _finish(self, sequence: _Sequence, generation: Generation) -> None:
        if not sequence.done.done():
            self._turns.hand_back(sequence.request.id, finished=generation.finish_reason != "abort")
            sequence.done.set_result(generation)

    def _free(self, slot: int, reason: FinishReason) -> None:
        """Ends the response in a slot and frees the slot."""
        sequence, self._running[slot] = self._running[slot], None
        assert sequence is not None
        self._finish(sequence, self._table.take(slot, reason))

    def _end_aborted(self) -> None:
        """Ends aborted requests, and those that nobody waits for any more."""
        if not self._some_ended:
            return
        self._some_ended = False
        for sequence in [sequence for sequence in self._waiting if sequence.aborted or sequence.done.done()]:
            self._waiting.remove(sequence)
            self._finish(sequence, _NOTHING)
        for slot, running in enumerate(self._running):
            if running is not None and (running.aborted or running.done.done()):
                self._free(slot, "abort")

    def _admit(self) -> None:
        """Fills free slots with waiting requests; after an update of the weights, reads running sequences again."""
        to_read = self._table.running.tolist() if self._outdated else []
        if self._waiting:
            for slot in [slot for slot, sequence in enumerate(self._running) if sequence is None]:
                if not self._waiting:
                    break
                self._running[slot] = sequence = self._waiting.popleft()
                self._table.begin(slot, sequence.request)
                to_read.append(slot)
        if to_read:
            sequences = {slot: self._table.all_tokens(slot) for slot in to_read}
            for model in self._models:
                model.read(sequences)
        self._outdated = False

    def _sample(self) -> bool:
        """Samples one token for every running sequence; returns whether any response has ended."""
        ended = False
        running = self._table.running
        rows = max(1, _DRAWN_ELEMENTS // self.model.config.vocab_size)
        for first in range(0, len(running), rows):
            slots = running[first : first + rows]
            how = self._table.draw(slots, self._entropy_at)
            logits = [model.next_logits(slots).double() for model in self._models]
            drawn = self.rule(logits[0], logits[1], how) if self.rule is not None else draw_from_one(logits[0], how)
            for slot, reason in self._table.append(slots, drawn, self._model.version):
                self._free(slot, reason)
                ended = True
        return ended

    def _decode(self) -> None:
        """Computes the logits of the next token of every running sequence."""
        if len(running := self._table.running):
            running = self._compact(running)
            for model in self._models:
                model.decode(running, *self._table.last(running))

    def _compact(self, running: NDArray[np.int64]) -> NDArray[np.int64]:
        """Moves sequences from slots beyond the next pass's rows to free slots within it; returns the slots in use."""
        width = min(model.width(len(running)) for model in self._models)
        outside = running[running >= width]
        if not len(outside):
            return running
        free = [slot for slot in range(width) if self._running[slot] is None]
        moves = dict(zip(outside.tolist(), free, strict=False))
        for model in self._models:
            model.move(moves, self._table.longest(outside))
        self._table.move(moves)
        for old, new in moves.items():
            self._running[old], self._running[new] = None, self._running[old]
        return self._table.running

    def driving(self, responses: int) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a block in which the engine waits for a driver; see :meth:`.engine.RolloutEngine.driving`."""
        return self._turns.driving(responses)

    def deciding(self, request_id: str) -> AbstractAsyncContextManager[None]:
        """Opens a block of decisions; see :meth:`.engine.RolloutEngine.deciding`."""
        return self._turns.deciding(request_id)

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """Ends these requests, or all, before their next token; see :meth:`.engine.RolloutEngine.abort`."""
        for sequence in self._in_flight():
            sequence.aborted |= ids is None or sequence.request.id in ids
        self._some_ended = True
        self._aborting.set()

    async def pause(self) -> None:
        """Stops sampling; see :meth:`.engine.RolloutEngine.pause`."""
        self._going.clear()

    async def resume(self) -> None:
        """Continues sampling; see :meth:`.engine.RolloutEngine.resume`."""
        self._going.set()

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights between two passes. Requests in flight go on with them; their tokens are read again.

        Args:
            tensors: Hugging Face names (one per expert, as on disk) and whole tensors; all of them, in any order.
            version: Version of these weights.

        Raises:
            EngineError: names or shapes are not the model's, or some are missing; the engine must not be used then.
        """
        self._model.update_weights(tensors, version)
        self._outdated = True

    async def release_memory(self, *what: EngineMemory) -> None:
        """Frees memory; raises EngineError if requests are in flight."""
        if self._waiting or any(self._running):
            raise EngineError("release_memory: requests are in flight; abort them or let them end")
        self._model.release(*what)
        if "kv_cache" in what:
            for model in self._models[1:]:  # its weights are never updated, so they stay
                model.release("kv_cache")

    async def restore_memory(self, *what: EngineMemory) -> None:
        """Allocates released memory again; see :meth:`.engine.RolloutEngine.restore_memory`."""
        self._model.restore(*what)

    async def weight_version(self) -> int:
        """Returns the version of the weights."""
        return self._model.version

    async def health(self) -> tuple[WorkerHealth, ...]:
        """Returns the state of the engine, the only worker."""
        return (WorkerHealth("embedded", not self._closed, self._model.version, len(self._in_flight())),)

    async def close(self) -> None:
        """Aborts the requests in flight and ends the sampling task."""
        self._closed = True
        await self.abort()
        await self.resume()
        self._turns.end()
        if self._task is not None:
            await self._task


def weights_of(model: transformers.PreTrainedModel) -> Mapping[str, Tensor]:
    """Returns the tensors of a model of transformers, as :meth:`EmbeddedEngine.update_weights` takes them."""
    return parameters_by_hf_name(model)
