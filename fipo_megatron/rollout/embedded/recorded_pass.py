"""Forward passes as recorded operators: the same kernels in the same order, without the Python of the model's modules.

A pass over one token per sequence takes microseconds per operator, and the Python of transformers' modules half as long
again. The operators of a shape are therefore recorded once, as torch dispatches them, and replayed afterwards. The
replay calls what the model called, with the same arguments, so it computes the same bits.

A recording must hold for every input of its shape. It is refused if more than values depends on the data: the number of
tokens of an expert, or a length that is read from a tensor. It is used once it has given the bits of another pass.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

Pass: TypeAlias = Callable[..., Tensor]
"""Function of tensors that returns a tensor; it may also write to tensors that it holds."""
RECORD_AFTER = 16
"""Passes of a shape after which it is recorded. A recording pays off after about twice as many."""
KEPT = 32
"""Recordings that are kept: those used last. One takes half a kilobyte per operator."""
_VARIABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RecordedPasses:
    """Runs passes, from recordings where there are any.

    Args:
        function: The pass. It must depend on its inputs, on their shapes and on tensors whose values may change, but
            not on anything else that changes between two calls of :meth:`forget`.
    """

    def __init__(self, function: Pass) -> None:
        self._function = function
        self._passes: dict[Hashable, int] = {}
        self._unchecked: dict[Hashable, Pass] = {}
        self._recorded: OrderedDict[Hashable, Pass] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the result of the pass; gradients are not recorded."""
        shape = tuple(tensor.shape for tensor in inputs)
        if shape in self._recorded:
            self._recorded.move_to_end(shape)
            with torch.inference_mode():
                return self._recorded[shape](*inputs)
        count = self._passes[shape] = self._passes.get(shape, 0) + 1
        with torch.no_grad():
            result = self._function(*inputs)
            if count == RECORD_AFTER:
                self._record(shape, inputs)
            elif shape in self._unchecked:
                self._check(shape, inputs, result)
        return result

    def __len__(self) -> int:
        """Returns the number of recorded shapes."""
        return len(self._recorded)

    def forget(self) -> None:
        """Forgets all recordings: tensors that the function holds were replaced by others."""
        for known in (self._passes, self._unchecked, self._recorded):
            known.clear()

    def _record(self, shape: Hashable, inputs: tuple[Tensor, ...]) -> None:
        try:
            self._unchecked[shape] = record(self._function, *inputs)
        except Exception as error:  # whatever keeps a model from being recorded must not keep it from running
            logger.info("passes are not recorded: %s: %s", type(error).__name__, error)

    def _check(self, shape: Hashable, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        """Uses a recording from now on if it gives the bits of a pass over other data."""
        recorded = self._unchecked.pop(shape)
        if torch.equal(recorded(*inputs), result):
            self._recorded[shape] = recorded
            if len(self._recorded) > KEPT:
                dropped, _ = self._recorded.popitem(last=False)
                del self._passes[dropped]
        else:
            logger.info("passes are not recorded: a replay gives other bits")


def record(function: Pass, *inputs: Tensor) -> Pass:
    """Records the operators of a function by running it, without gradients.

    Parameters, buffers and other tensors that the function holds are held by the recording: it reads their values at
    the time of the replay, and writes to them.

    Args:
        function: The function.
        inputs: Inputs of the shapes for which the recording is valid.

    Raises:
        ValueError: an operator's output depends on data otherwise than by its values.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        result = function(*inputs)
    return _compiled(inputs, recorder.calls, result)


@dataclass(frozen=True)
class _Call:
    """A call of an operator.

    Attributes:
        operator: The operator.
        arguments: Its arguments by position.
        options: Its arguments by name.
        result: What it returned: a tensor, or a sequence of tensors.
    """

    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    result: Any

    @property
    def read(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return _tensors((self.arguments, self.options))

    @property
    def is_view(self) -> bool:
        """Whether the result is a view of an argument."""
        storages = {tensor.untyped_storage()._cdata for tensor in self.read}
        found = isinstance(self.result, Tensor) and self.result.untyped_storage()._cdata in storages
        return found and not self.operator._schema.is_mutable


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Records all operators that run in its block, and keeps their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _VARIABLE):
            raise ValueError(f"{func}: its output depends on the data")
        result = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, result))
        return result


def _compiled(inputs: Sequence[Tensor], calls: Sequence[_Call], result: Tensor) -> Pass:
    """Returns recorded calls as a Python function that frees each tensor after its last use."""
    names = {id(tensor): f"input_{number}" for number, tensor in enumerate(inputs)}
    parameters = ", ".join(names.values())
    made = [call for call in calls if not _is_held_view(call, names)]
    held: dict[str, Any] = {}

    def written(value: object) -> str:
        if isinstance(value, Tensor) and id(value) in names:
            return names[id(value)]
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(written, value)) + "]"
        held[name := f"held_{len(held)}"] = value
        return name

    lines = [f"def recorded({parameters}):"]
    for call, unused in _needed(made, result):
        held[operator := f"operator_{len(held)}"] = call.operator
        arguments = [written(value) for value in call.arguments]
        arguments += [f"{name}={written(value)}" for name, value in call.options.items()]
        lines.append(f"    {_target(call.result, names)}{operator}({', '.join(arguments)})")
        freed = sorted({names[id(tensor)] for tensor in unused if id(tensor) in names})
        lines += [f"    del {', '.join(freed)}"] if freed else []
    lines.append(f"    return {written(result)}")
    exec("\n".join(lines), held)  # the lines consist of names that are made here
    recorded: Pass = held["recorded"]
    return recorded


def _is_held_view(call: _Call, names: dict[int, str]) -> bool:
    """Returns whether a call gives a view of held tensors, such as a transposed weight, which is then held itself.

    If not, the new tensors among its results get names.
    """
    read = {id(tensor) for tensor in call.read}
    if call.is_view and read.isdisjoint(names):
        return True
    for tensor in _tensors(call.result):
        if id(tensor) not in read:  # as the result of an operator that writes is
            names[id(tensor)] = f"value_{len(names)}"
    return False


def _needed(calls: Sequence[_Call], result: Tensor) -> Iterator[tuple[_Call, list[Tensor]]]:
    """Yields the calls that write to a tensor or whose results are used, each with what is not used after it."""
    later, needed = {id(result)}, []
    for call in reversed(calls):
        results = _tensors(call.result)
        if call.operator._schema.is_mutable or any(id(tensor) in later for tensor in results):
            tensors = {id(tensor): tensor for tensor in results + call.read}
            needed.append((call, [tensor for key, tensor in tensors.items() if key not in later]))
            later |= tensors.keys()
    return reversed(needed)


def _target(result: object, names: Mapping[int, str]) -> str:
    """Returns the left side of the assignment of a result; empty for a held tensor."""
    if isinstance(result, Tensor):
        return f"{names[id(result)]} = " if id(result) in names else ""
    return "".join(f"{names[id(tensor)]}, " for tensor in _tensors(result)) + "= "


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
