"""Forward passes as recorded operators: the same kernels in the same order, without the Python of the model's modules.

A pass over one token per sequence takes microseconds per operator, and a model of transformers spends about as long in
Python. The operators of a shape are therefore recorded once, by torch's tracer, and replayed afterwards. The replay
calls what the model called, with the same arguments, so it computes the same bits.

A recording must hold for every input of its shape. It is refused if more than values depends on the data: the number
of tokens of an expert, or a length that is read from a tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger(__name__)

Pass: TypeAlias = Callable[..., Tensor]
"""Function of tensors that returns a tensor; it may also write to tensors that it holds."""
RECORD_AFTER = 64
"""Passes of a shape after which it is recorded: about as long as a recording takes to pay off."""
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
        self._recorded: dict[Hashable, Pass] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the result of the pass; gradients are not recorded."""
        shape = tuple(tensor.shape for tensor in inputs)
        if shape in self._recorded:
            with torch.inference_mode():
                return self._recorded[shape](*inputs)
        count = self._passes[shape] = self._passes.get(shape, 0) + 1
        with torch.no_grad():
            result = self._function(*inputs)
            if count == RECORD_AFTER:
                self._record(shape, inputs, result)
        return result

    def __len__(self) -> int:
        """Returns the number of recorded shapes."""
        return len(self._recorded)

    def forget(self) -> None:
        """Forgets all recordings: tensors that the function holds were replaced by others."""
        self._passes.clear()
        self._recorded.clear()

    def _record(self, shape: Hashable, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        """Records the pass if its replay gives this result bit for bit."""
        try:
            recorded = record(self._function, *inputs)
        except Exception as error:  # whatever keeps a model from being traced must not keep it from running
            logger.info("passes are not recorded: %s: %s", type(error).__name__, error)
            return
        if torch.equal(recorded(*inputs), result):
            self._recorded[shape] = recorded
        else:
            logger.info("passes are not recorded: a replay gives other bits")


def record(function: Pass, *inputs: Tensor) -> Pass:
    """Records the operators of a function by running it.

    Parameters, buffers and other tensors that the function holds are held by the recording: it reads their values at
    the time of the replay, and writes to them.

    Args:
        function: The function.
        inputs: Inputs of the shapes for which the recording is valid.

    Raises:
        ValueError: an operator's output depends on data otherwise than by its values.
    """
    graph = make_fx(lambda *given: function(*given))(*inputs).eval()  # the tracer miscounts the inputs of a method
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and any(tag in node.target.tags for tag in _VARIABLE):
            raise ValueError(f"{node.target}: its output depends on the data")
    _fold_views(graph)
    return _compiled(graph)


def _fold_views(graph: fx.GraphModule) -> None:
    """Replaces views of held tensors, such as transposed weights, by tensors that are held instead."""
    held: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            held[node] = getattr(graph, str(node.target))
        elif node.op == "call_function" and node.all_input_nodes and all(n in held for n in node.all_input_nodes):
            arguments, options = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
            schema = getattr(node.target, "_schema", None)
            if schema is None or schema.is_mutable:
                continue
            value = node.target(*arguments, **options)
            if isinstance(value, Tensor) and value._is_view():
                held[node] = value
    for number, (node, value) in enumerate(held.items()):
        if node.op == "call_function":
            graph.register_buffer(f"_view{number}", value)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"_view{number}"))
    graph.graph.eliminate_dead_code()


def _compiled(graph: fx.GraphModule) -> Pass:
    """Returns a graph as a Python function that frees each tensor after its last use.

    The function that torch generates looks up operators and held tensors by name, in each pass.
    """
    names: dict[str, Any] = {}

    def written(value: object) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(written, value)) + "]"
        names[name := f"constant_{len(names)}"] = value
        return name

    inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    lines = [f"def recorded({', '.join(inputs)}):"]
    for node, freed in _with_freed(graph.graph):
        if node.op == "get_attr":
            names[node.name] = getattr(graph, str(node.target))
        elif node.op == "call_function":
            names[operator := f"operator_{len(names)}"] = node.target
            arguments = [written(value) for value in node.args]
            arguments += [f"{name}={written(value)}" for name, value in node.kwargs.items()]
            lines.append(f"    {node.name} = {operator}({', '.join(arguments)})")
            lines += [f"    del {', '.join(freed)}"] if freed else []
        elif node.op == "output":
            lines.append(f"    return {written(node.args[0])}")
    exec("\n".join(lines), names)  # the lines consist of names that are made here or by torch's tracer
    recorded: Pass = names["recorded"]
    return recorded


def _with_freed(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[str]]]:
    """Yields each node with the names of the computed values that no later node uses."""
    last = {used: node for node in graph.nodes for used in node.all_input_nodes}
    for node in graph.nodes:
        values = [node, *node.all_input_nodes] if node.op == "call_function" else []
        yield node, [v.name for v in values if v.op == "call_function" and last.get(v, node) is node]
