"""Adaptations of Megatron-Core to a machine without CUDA. All of them are in this module.

Megatron-Core's sources stay unmodified. Each entry of :data:`ADAPTATIONS` replaces one attribute and cites the lines of
Megatron that need it, in each of :data:`MEGATRON_VERSIONS`. ``docs/upstream.md`` is generated from the list, and a test
shows for every entry that the installed version needs it. A Megatron module that asks ``torch`` for CUDA sees another
``torch``; other modules do not. ``Tensor.type`` and ``Tensor.cuda`` are replaced globally, but behave differently only
when the named Megatron module calls them.

    python -m fipo_megatron.actor.cpu_backend

prints the table of ``docs/upstream.md``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MEGATRON_VERSIONS = ("0.16.1", "0.19.2")
"""The tested versions, whose lines :data:`ADAPTATIONS` cites."""


@dataclass(frozen=True)
class Adaptation:
    """One runtime change to Megatron-Core or to torch.

    Attributes:
        name: ``module:attribute`` under ``megatron.core``, or the method of ``torch.Tensor`` and the module that calls
            it.
        effect: Behaviour with the change.
        needed_by: Lines that need the change, ``file:line`` under ``megatron/core``, by version; a version that does
            not need it is missing.
        why: Failure without the change.
        apply: Function that makes the change.
    """

    name: str
    effect: str
    needed_by: Mapping[str, Sequence[str]]
    why: str
    apply: Callable[[], None]


class _Overlay:
    """A module with some attributes replaced."""

    def __init__(self, under: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _under=under)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


class _Stream:
    """A CUDA stream on which all work is done when a call returns: every stream is the current one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a tensor factory so that ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _torch_on_cpu() -> Any:
    """Returns ``torch`` with the CPU as the current CUDA device and the CPU's generator as that of CUDA."""

    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda device=None: None,
        get_rng_state=get_rng_state,
        manual_seed=manual_seed,
        random=SimpleNamespace(get_rng_state=get_rng_state),
        Stream=_Stream,
        current_stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
    )
    return _Overlay(torch, cuda=cuda, tensor=_on_cpu(torch.tensor), zeros=_on_cpu(torch.zeros))


def _set(module: str, attribute: str, value: Callable[[Any], Any]) -> Callable[[], None]:
    """Returns a function that sets ``megatron.core.<module>.<attribute>`` to ``value(<its old value>)``."""

    def apply() -> None:
        target = importlib.import_module(f"megatron.core.{module}")
        setattr(target, attribute, value(getattr(target, attribute, None)))

    return apply


def _cited(*lines: str) -> dict[str, list[str]]:
    """Expands ``file:line,line file:line`` of each version; an empty text stands for a version without such lines."""
    return {
        version: [f"{file}:{number}" for file, _, numbers in parts for number in numbers.split(",")]
        for version, text in zip(MEGATRON_VERSIONS, lines, strict=True)
        if (parts := [part.partition(":") for part in text.split()])
    }


def _sees_cpu(module: str, needed_by: Mapping[str, Sequence[str]], why: str) -> Adaptation:
    return Adaptation(
        f"{module}:torch",
        "`torch.cuda` means the CPU in this module",
        needed_by,
        why,
        _set(module, "torch", lambda _: _torch_on_cpu()),
    )


def _set_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _host_tensor(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


_type_of, _to_cuda = Tensor.type, Tensor.cuda
_type_callers: set[str] = set()
_cuda_callers: set[str] = set()


@functools.wraps(_type_of)
def _type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    name = _type_of(self, *args, **kwargs)
    if args or kwargs or sys._getframe(1).f_globals.get("__name__") not in _type_callers:
        return name
    return str(name).replace("torch.", "torch.cuda.", 1)


@functools.wraps(_to_cuda)
def _cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if sys._getframe(1).f_globals.get("__name__") in _cuda_callers:
        return self
    return _to_cuda(self, *args, **kwargs)


def _tensor_method(
    method: str, module: str, effect: str, needed_by: Mapping[str, Sequence[str]], why: str
) -> Adaptation:
    callers, replacement = {"type": (_type_callers, _type), "cuda": (_cuda_callers, _cuda)}[method]

    def apply() -> None:
        callers.add(f"megatron.core.{module}")
        setattr(Tensor, method, replacement)

    return Adaptation(f"Tensor.{method} in {module}", effect, needed_by, why, apply)


_TYPE_EFFECT = "says `torch.cuda.FloatTensor` of a CPU float tensor, and so on, to this module"

ADAPTATIONS: tuple[Adaptation, ...] = (
    _sees_cpu(
        "tensor_parallel.random",
        _cited("tensor_parallel/random.py:55,235,422", "tensor_parallel/random.py:118,303,490"),
        "seeding and activation recompute ask for the state of the CUDA generator",
    ),
    Adaptation(
        "tensor_parallel.random:_set_cuda_rng_state",
        "sets the state of the CPU generator",
        _cited("tensor_parallel/random.py:111", "tensor_parallel/random.py:174"),
        "the change is queued until CUDA starts, which is never: what draws in a forked state draws from another",
        _set("tensor_parallel.random", "_set_cuda_rng_state", lambda _: _set_rng_state),
    ),
    _sees_cpu(
        "tensor_parallel.mappings",
        _cited("tensor_parallel/mappings.py:141,181", "tensor_parallel/mappings.py:145,185"),
        "gathers and reduce-scatters of sequence parallelism allocate on the current CUDA device",
    ),
    _sees_cpu(
        "tensor_parallel.layers",
        _cited("tensor_parallel/layers.py:552", "tensor_parallel/layers.py:647"),
        "the backward pass of sequence-parallel linear layers allocates on the current CUDA device",
    ),
    _sees_cpu(
        "utils",
        _cited("utils.py:631", "utils.py:715"),
        "the buffer of the all-gather before sequence-parallel linear layers is on the current CUDA device",
    ),
    _sees_cpu(
        "pipeline_parallel.p2p_communication",
        _cited("pipeline_parallel/p2p_communication.py:190,313", "pipeline_parallel/p2p_communication.py:211,334"),
        "receive buffers are on the current CUDA device",
    ),
    _sees_cpu(
        "pipeline_parallel.schedules",
        _cited("pipeline_parallel/schedules.py:596,983,2138", "pipeline_parallel/schedules.py:749,1121,2292"),
        "the token count is a CUDA tensor in all three schedules",
    ),
    _sees_cpu(
        "distributed.param_and_grad_buffer",
        _cited("distributed/param_and_grad_buffer.py:800,806", "distributed/param_and_grad_buffer.py:1180,1186"),
        "parameter and gradient buffers are on the current CUDA device",
    ),
    _sees_cpu(
        "optimizer.optimizer",
        _cited("optimizer/optimizer.py:473,485,907", "optimizer/optimizer.py:690,702,1249"),
        "the loss scale and the overflow flag are CUDA tensors",
    ),
    _sees_cpu(
        "optimizer.clip_grads",
        _cited("optimizer/clip_grads.py:103,174", "optimizer/clip_grads.py:112,180"),
        "the flag that the gradient norm and its clipping take is a CUDA tensor",
    ),
    _tensor_method(
        "type",
        "optimizer.clip_grads",
        _TYPE_EFFECT,
        _cited("optimizer/clip_grads.py:167", "optimizer/clip_grads.py:174"),
        "gradients to clip must be `torch.cuda.FloatTensor` by name",
    ),
    _tensor_method(
        "type",
        "optimizer.optimizer",
        _TYPE_EFFECT,
        _cited("optimizer/optimizer.py:671,690", "optimizer/optimizer.py:1009,1028"),
        "bf16 parameters are told from fp32 ones by the name of their CUDA type",
    ),
    _tensor_method(
        "type",
        "optimizer.distrib_optimizer",
        _TYPE_EFFECT,
        _cited("optimizer/distrib_optimizer.py:361,420", "optimizer/distrib_optimizer.py:401,466"),
        "the distributed optimizer tells parameters apart by the name of their CUDA type",
    ),
    _tensor_method(
        "cuda",
        "models.common.language_module.language_module",
        "returns the tensor itself to this module",
        _cited(
            "models/common/language_module/language_module.py:244",
            "models/common/language_module/language_module.py:307",
        ),
        "tied embeddings under pipeline parallelism are moved to CUDA before their first all-reduce",
    ),
    _sees_cpu(
        "transformer.moe.router",
        _cited("transformer/moe/router.py:90", "transformer/moe/router.py:98"),
        "weights found on the CPU are moved to the current CUDA device",
    ),
    Adaptation(
        "transformer.moe.moe_utils:te_general_gemm",
        "None",
        _cited("transformer/moe/moe_utils.py:1192,1225", ""),
        "the name is not defined where Transformer Engine is not installed",
        _set("transformer.moe.moe_utils", "te_general_gemm", lambda found: found),
    ),
    _sees_cpu(
        "transformer.moe.token_dispatcher",
        _cited("transformer/moe/token_dispatcher.py:445,871", "transformer/moe/token_dispatcher.py:469,922"),
        "the all-to-all dispatcher copies its split sizes to the host on a CUDA stream of its own",
    ),
    Adaptation(
        "transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "converts to numpy where asked to",
        _cited(
            "transformer/moe/token_dispatcher.py:879 transformer/moe/moe_utils.py:1093",
            "transformer/moe/token_dispatcher.py:930 transformer/moe/moe_utils.py:1184",
        ),
        "only CUDA tensors are converted, so tensors arrive where lists of split sizes are expected",
        _set("transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", lambda _: _host_tensor),
    ),
)
"""All changes, in the order in which :func:`install` makes them."""

_installed = False


def needed(version: str | None = None) -> tuple[Adaptation, ...]:
    """Returns the adaptations that a version of Megatron-Core needs.

    Args:
        version: The version; None for the installed one. One that is not tested counts as the newest tested one below
            it.
    """
    version = metadata.version("megatron-core") if version is None else version
    tested = max(
        (each for each in MEGATRON_VERSIONS if _number(each) <= _number(version)), default=MEGATRON_VERSIONS[0]
    )
    return tuple(adaptation for adaptation in ADAPTATIONS if tested in adaptation.needed_by)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def install(without: Collection[str] = ()) -> None:
    """Applies the adaptations that the installed Megatron-Core needs, once per process.

    Args:
        without: Names of adaptations to leave out, for the tests that show that they are needed.

    Raises:
        RuntimeError: CUDA is available, where Megatron-Core needs no adaptation.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("cpu_backend.install: CUDA is available; Megatron-Core runs on it as it is")
    if _installed:
        return
    _installed = True
    for adaptation in needed():
        if adaptation.name not in without:
            adaptation.apply()


def table() -> str:
    """Returns the adaptations as the Markdown table of ``docs/upstream.md``."""
    rows = []
    for adaptation in ADAPTATIONS:
        lines = [
            ", ".join(f"`{line}`" for line in adaptation.needed_by.get(version, ())) or "not needed"
            for version in MEGATRON_VERSIONS
        ]
        rows.append(f"| {' | '.join([f'`{adaptation.name}`', adaptation.effect, *lines, adaptation.why])} |")
    needed_by = " | ".join(f"needed by ({version})" for version in MEGATRON_VERSIONS)
    return "\n".join([f"| what | becomes | {needed_by} | otherwise |", "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
