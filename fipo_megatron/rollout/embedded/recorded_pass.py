"""Forward passes as recorded operators: the same kernels in the same order, without the Python of the model's modules.

A pass over one token per sequence takes microseconds per operator, and the Python of transformers' modules half as long
again. The operators of a shape are therefore recorded once, as torch dispatches them, and replayed afterwards. The
replay calls what the model called, with the same arguments, so it computes the same bits.

A recording must hold for every input of its shape. It is refused if more than values depends on the data: the number of
tokens of an expert, or a length that is read from a tensor. It is used once it has given the bits of another pass.

Tensors that a pass makes are known to the recording by name only, so a pass that is recorded takes no more memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

logger = logging.getLogger(__name__)

Pass: TypeAlias = Callable[..., Tensor]
"""Function of tensors that returns a tensor; it may also write to tensors that it holds."""
RECORD_AFTER = 16
"""Passes of a shape after which it is recorded. A recording pays off after about twice as many."""
KEPT = 32
"""Recordings that are kept: those used last. One takes half a kilobyte per operator."""
_VARIABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr)
"""Methods that give the memory of a tensor to Python or to a kernel that torch does not dispatch."""


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
        with _only_logged():
            self._unchecked[shape] = record(self._function, *inputs)

    def _check(self, shape: Hashable, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        """Uses a recording from now on if it gives the bits of a pass over other data."""
        recorded = self._unchecked.pop(shape)
        with _only_logged():
            if not torch.equal(recorded(*inputs), result):
                raise ValueError("a replay gives other bits")
            self._recorded[shape] = recorded
            if len(self._recorded) > KEPT:
                dropped, _ = self._recorded.popitem(last=False)
                del self._passes[dropped]


@contextmanager
def _only_logged() -> Iterator[None]:
    """Logs an exception: whatever keeps a model from being recorded must not keep it from running."""
    try:
        yield
    except Exception as error:
        logger.info("passes are not recorded: %s: %s", type(error).__name__, error)


def record(function: Pass, *inputs: Tensor) -> Pass:
    """Records the operators of a function by running it, without gradients.

    Parameters, buffers and other tensors that the function holds are held by the recording: it reads their values at
    the time of the replay, and writes to them.

    Args:
        function: The function.
        inputs: Inputs of the shapes for which the recording is valid.

    Raises:
        ValueError: an operator's output depends on data otherwise than by its values, or memory is read past operators.
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), _Refusal(), recorder:
        result = function(*inputs)
    return _compiled([f"input_{number}" for number in range(len(inputs))], recorder.calls, recorder.named(result))


@dataclass(frozen=True)
class _Name:
    """The name of an input, or of a tensor that the function makes."""

    name: str


@dataclass(frozen=True)
class _Call:
    """A call of an operator. Tensors that have names are replaced by them.

    Attributes:
        operator: The operator.
        arguments: Its arguments by position.
        options: Its arguments by name.
        result: Its result. That of an operator that writes to a held tensor is the held tensor.
    """

    operator: torch._ops.OpOverload
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    result: Any

    @property
    def reads(self) -> set[str]:
        """The names among the arguments."""
        return _names((self.arguments, self.options))


class _Refusal(TorchFunctionMode):
    """Refuses to read memory past operators: what is read would become part of the recording."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(func is read for read in _READS):
            raise ValueError(f"Tensor.{func.__name__}: reads memory past the operators of torch")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Records all operators that run in its block. It keeps tensors of the function, but none that the block makes."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.calls: list[_Call] = []
        self._known = WeakTensorKeyDictionary({tensor: f"input_{number}" for number, tensor in enumerate(inputs)})
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _VARIABLE):
            raise ValueError(f"{func}: its output depends on the data")
        options = kwargs or {}
        with torch._C.DisableTorchFunction():  # an operator may be implemented in Python
            result = func(*args, **options)
            self._add(func, args, options, result)
        return result

    def named(self, value: object) -> Any:
        """Returns a value with names in place of tensors that have one, and lists in place of tuples."""
        if isinstance(value, Tensor) and value in self._known:
            return _Name(self._known[value])
        if isinstance(value, list | tuple):
            return [self.named(each) for each in value]
        return value

    def _add(self, operator: Any, args: Sequence[Any], options: Mapping[str, Any], result: object) -> None:
        """Adds a call, unless it gives a view of held tensors, such as a transposed weight: it is held itself then."""
        read = _tensors((args, options))
        if _is_view(operator, read, result) and not any(tensor in self._known for tensor in read):
            return
        arguments, named_options = self.named(args), {name: self.named(value) for name, value in options.items()}
        written = {id(tensor) for tensor in read}  # an operator that writes returns an argument
        for tensor in _tensors(result):
            if id(tensor) not in written:
                self._known[tensor] = f"value_{self._made}"
                self._made += 1
        self.calls.append(_Call(operator, arguments, named_options, self.named(result)))


def _is_view(operator: Any, read: Sequence[Tensor], result: object) -> bool:
    """Returns whether the result of an operator is a view of what it has read."""
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    found = isinstance(result, Tensor) and result.untyped_storage()._cdata in storages
    return found and not operator._schema.is_mutable


def _compiled(inputs: Sequence[str], calls: Sequence[_Call], result: object) -> Pass:
    """Returns recorded calls as a Python function that frees each tensor after its last use."""
    held: dict[str, Any] = {}
    lines = [f"def recorded({', '.join(inputs)}):"]
    for call, unused in _needed(calls, result):
        held[operator := f"operator_{len(held)}"] = call.operator
        arguments = [_written(value, held) for value in call.arguments]
        arguments += [f"{name}={_written(value, held)}" for name, value in call.options.items()]
        lines.append(f"    {_target(call.result)}{operator}({', '.join(arguments)})")
        lines += [f"    del {', '.join(sorted(unused))}"] if unused else []
    lines.append(f"    return {_written(result, held)}")
    exec("\n".join(lines), held)  # the lines consist of names that are made here
    recorded: Pass = held.pop("recorded")  # not a part of its own globals: the tensors are free when it is forgotten
    return recorded


def _needed(calls: Sequence[_Call], result: object) -> list[tuple[_Call, set[str]]]:
    """Returns the calls that write to a tensor or whose results are used, each with the names not used after it."""
    later, needed = _names(result), []
    for call in reversed(calls):
        results = _names(call.result)
        if call.operator._schema.is_mutable or not results.isdisjoint(later):
            names = results | call.reads
            needed.append((call, names - later))
            later |= names
    return needed[::-1]


def _written(value: object, held: dict[str, Any]) -> str:
    """Returns the expression of an argument; what has no name is put into ``held``."""
    if isinstance(value, _Name):
        return value.name
    if isinstance(value, list):
        return "[" + ", ".join(_written(each, held) for each in value) + "]"
    held[name := f"held_{len(held)}"] = value
    return name


def _target(result: object) -> str:
    """Returns the left side of the assignment of a result; empty if nothing of it has a name."""
    return f"{_pattern(result)} = " if _names(result) else ""


def _pattern(result: object) -> str:
    if isinstance(result, list):
        return "[" + ", ".join(map(_pattern, result)) + "]"
    return result.name if isinstance(result, _Name) else "_"


def _names(value: object) -> set[str]:
    return {leaf.name for leaf in tree_leaves(value) if isinstance(leaf, _Name)}


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
