"""Process groups, seeds and the device: from torchrun's or Slurm's environment, or one rank alone.

NCCL where CUDA is available, else gloo with Megatron-Core adapted by :mod:`.cpu_backend`. Many layouts can follow each
other in one job: :func:`destroy` takes every process group down, :func:`initialize` sets the next ones up.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from fipo_megatron.actor import cpu_backend
from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import ParallelConfig, layout_conflicts
from fipo_megatron.data.context_parallel import CpLayout


@dataclass(frozen=True)
class RankLayout:
    """Where this process stands in every kind of parallelism.

    Attributes:
        rank: Of all processes.
        world_size: Number of processes.
        device: Of its tensors.
        tensor_rank: Its part of every weight matrix, of ``tensor_size``.
        tensor_size: Ranks that share every weight matrix.
        pipeline_rank: Its stage, of ``pipeline_size``.
        pipeline_size: Stages.
        virtual_size: Chunks of layers per stage; 1 without interleaving.
        data_rank: Its part of the micro-batches, of ``data_size``.
        data_size: Ranks that share the micro-batches.
        expert_rank: Its part of the experts, of ``expert_size``.
        expert_size: Ranks that share the experts.
        expert_tensor_rank: Its part of every expert's matrices, of ``expert_tensor_size``.
        expert_tensor_size: Ranks that share every expert's matrices.
        context: Its part of every sequence.
        sequence_parallel: Whether activations between matrices are shared over the tensor-parallel ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    context: CpLayout
    sequence_parallel: bool

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding is here."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the output weight, and so the loss, is here."""
        return self.pipeline_rank == self.pipeline_size - 1


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raises ValueError, naming every field at fault, unless the ranks can be split as asked."""
    problems = layout_conflicts(parallel, world_size)
    if problems:
        raise ValueError("\n".join(problems))


_store: dist.Store | None = None
_generation = 0


def initialize(
    parallel: ParallelConfig,
    seed: int,
    environment: Mapping[str, str] | None = None,
    timeout: timedelta = timedelta(minutes=30),
) -> RankLayout:
    """Sets up process groups, Megatron's parallel state, the device and every random generator.

    Args:
        parallel: The layout.
        seed: The same on every rank; pipeline stages and Megatron's tracker derive theirs from it.
        environment: Of the launcher; ``os.environ`` where None.
        timeout: Of a collective.

    Raises:
        ValueError: the world size does not fit the layout (before any process group is made), or the launcher's
            environment is incomplete.
        OSError: the port of rank 0 is in use.
        RuntimeError: a layout is up already.
    """
    if dist.is_initialized():
        raise RuntimeError("parallel.initialize: process groups exist already; call destroy() first")
    launch = Launch.from_environment(os.environ if environment is None else environment)
    check_world_size(parallel, launch.world_size)
    device = _device(launch)
    if device.type == "cpu":
        cpu_backend.install()
    from megatron.core import parallel_state

    _start_process_group(launch, timeout, device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    layout = _layout(parallel, launch, device)
    _seed(seed + 100 * layout.pipeline_rank)
    return layout


def store() -> dist.Store:
    """The store of all ranks of the layout that is up, for what must not wait inside a collective.

    Raises:
        RuntimeError: none is up.
    """
    if _store is None or not dist.is_initialized():
        raise RuntimeError("parallel.store: call initialize() first")
    return dist.PrefixStore(_prefix(), _store.clone())  # a connection of its own: a wait blocks nobody else


def destroy() -> None:
    """Takes down what :func:`initialize` set up; harmless where nothing is up."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A launcher may show each process its own GPU only, which is then number 0.
    index = 0 if visible == 1 else launch.local_rank
    if index >= visible:
        raise ValueError(f"LOCAL_RANK = {launch.local_rank}: there are {visible} GPUs on this host")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _start_process_group(launch: Launch, timeout: timedelta, device: torch.device) -> None:
    """Every layout, and every restart by torchrun, has its own keys in one store, so that none meets another's."""
    global _store, _generation
    if _store is None:
        _store = dist.HashStore() if not launch.address else _rendezvous(launch, timeout)
    _generation += 1
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(_prefix(), _store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _prefix() -> str:
    return f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/layout{_generation}"


def _rendezvous(launch: Launch, timeout: timedelta) -> dist.Store:
    # torchrun's agent already listens on the port that it hands out.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            launch.address,
            launch.port,
            launch.world_size,
            is_master=launch.rank == 0 and not served,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(
            errno.EADDRINUSE,
            f"MASTER_PORT = {launch.port}: another program listens there on this host; set another one on all ranks",
        ) from None


def _layout(parallel: ParallelConfig, launch: Launch, device: torch.device) -> RankLayout:
    from megatron.core import parallel_state as state

    return RankLayout(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        virtual_size=parallel.virtual_pipeline,
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_size=state.get_expert_model_parallel_world_size(),
        expert_tensor_rank=state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=state.get_expert_tensor_parallel_world_size(),
        context=CpLayout(state.get_context_parallel_world_size(), state.get_context_parallel_rank()),
        sequence_parallel=parallel.sequence_parallel,
    )


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from it exist
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
