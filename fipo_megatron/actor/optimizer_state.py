"""The optimizer state as shards that any layout can load, in the same checkpoint as the weights.

The format is Megatron-Core's ``fully_reshardable``: moments and main parameters have the shapes of the parameters. Its
other format for the distributed optimizer, ``dp_reshardable``, needs no gathering when saving, but then tensor- and
pipeline-parallel sizes cannot change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from fipo_megatron.actor.actor import MegatronActor

Sharding = Literal["fully_reshardable", "dp_reshardable"]
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_GROUP_NAME = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells the parameter groups of an optimizer apart, in every version of Megatron-Core."""
_OF_THE_STATE = ("params", "step")
"""The entries of a parameter group that are no hyper-parameters."""


def content(sharding: Sharding) -> dict[str, Any]:
    """Returns Megatron-Core's metadata on names and sharding of tensors, which is saved in the checkpoint."""
    return {
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": sharding,
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathers on the host
        "chained_optim_avoid_prefix": True,
    }


def optimizer_shards(actor: MegatronActor, sharding: Sharding, *, loading: bool) -> ShardedStateDict:
    """Returns this rank's shards of the optimizer state. A collective.

    Args:
        actor: Actor of this rank. The state of an optimizer that has not taken a step is initialised.
        sharding: Format of the shards (:mod:`.optimizer_state`).
        loading: Whether the shards will be filled from a checkpoint.
    """
    _initialise_state(actor)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = content(sharding) | {"dp_cp_group": group}
    chunks = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(actor.chunks)}
    model = chunks if len(chunks) > 1 else chunks["model0"]
    found: ShardedStateDict = actor.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return found


@torch.no_grad()
def fill_optimizer(actor: MegatronActor, state: ShardedStateDict) -> None:
    """Restores the state loaded into :func:`optimizer_shards`; hyper-parameters remain as configured. A collective."""
    configured = [
        [{name: value for name, value in group.items() if name not in _OF_THE_STATE} for group in groups]
        for groups in (inner.optimizer.param_groups for inner in _inner(actor))
    ]
    _configure_groups(state, [group for groups in configured for group in groups])
    if any(isinstance(inner.optimizer, _TORCH_ADAM) for inner in _inner(actor)):
        _add_step_zero(state)
    with _torch_adam(actor):
        actor.optimizer.load_state_dict(state)
    for inner, groups in zip(_inner(actor), configured, strict=True):
        for group, own in zip(inner.optimizer.param_groups, groups, strict=True):
            group.update(own)
        for values in inner.optimizer.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()  # else all parameters advance one shared counter


def optimizer_tensors(actor: MegatronActor) -> Iterator[torch.Tensor]:
    """Yields the tensors that the optimizer changes: main parameters, moments and step counters."""
    for inner in _inner(actor):
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _inner(actor: MegatronActor) -> list[Any]:
    return list(getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]))


def _initialise_state(actor: MegatronActor) -> None:
    """Creates missing moments as zeros; torch's Adam creates them in its first step."""
    for inner in _inner(actor):
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                state = inner.optimizer.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
                    if isinstance(inner.optimizer, _TORCH_ADAM):
                        state["step"] = torch.tensor(0.0)


def _configure_groups(state: Any, configured: Sequence[dict[str, Any]]) -> None:
    """Replaces the hyper-parameters of the loaded parameter groups, by which Megatron-Core 0.19 looks for a group."""
    if isinstance(state, dict) and isinstance(groups := state.get("param_groups"), list):
        for group in groups:
            for own in configured:
                if all(group.get(name) == own.get(name) for name in _GROUP_NAME):
                    group.update(own)
                    break
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            _configure_groups(part, configured)


def _add_step_zero(state: Any) -> None:
    """Adds the step counter, which Megatron-Core leaves out of checkpoints before the first optimizer step."""
    if isinstance(state, dict) and isinstance(parameters := state.get("state"), dict) and "param_groups" in state:
        if parameters and "common_step" not in parameters:
            parameters["common_step"] = torch.tensor(0.0)
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            _add_step_zero(part)


@contextmanager
def _torch_adam(actor: MegatronActor) -> Iterator[None]:
    """Leaves out the step counter of torch's Adam while loading: Megatron-Core 0.16 expects it but does not save it."""
    changed = [inner for inner in _inner(actor) if isinstance(inner, DistributedOptimizer)]

    def setter(inner: DistributedOptimizer) -> Any:
        def set_state(model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
            group, order = inner.model_param_group_index_map[model_parameter]
            main = inner.optimizer.param_groups[group]["params"][order]
            for name, target in {"param": main, **inner.optimizer.state[main]}.items():
                if name != "step":
                    target.detach().copy_(tensors[name])

        return set_state

    for inner in changed:
        if isinstance(inner.optimizer, _TORCH_ADAM):
            inner._set_main_param_and_optimizer_states = setter(inner)
    try:
        yield
    finally:
        for inner in changed:
            inner.__dict__.pop("_set_main_param_and_optimizer_states", None)
