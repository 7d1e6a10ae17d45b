"""Process groups, seeds and the device of a layout, under torchrun, Slurm or as a single process.

The backend is NCCL if CUDA is available, else gloo with Megatron-Core adapted by :mod:`.cpu_backend`. Several layouts
can follow each other in one job: :func:`destroy` destroys all process groups, :func:`initialize` creates new ones.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from fipo_megatron.actor import cpu_backend
from fipo_megatron.actor.launch import Launch as Launch  # also under this name
from fipo_megatron.config import ParallelConfig, layout_conflicts
from fipo_megatron.data.context_parallel import CpLayout

logger = logging.getLogger(__name__)
_TIMEOUT = timedelta(minutes=30)
"""Limit of one collective, and of the wait for rank 0 at the start."""
_PATIENCE_SECONDS = 10.0
"""Seconds after which the wait for rank 0 is logged, and then six times less often."""


@dataclass(frozen=True)
class RankLayout:
    """The rank of this process in every kind of parallelism.

    Attributes:
        rank: Rank among all processes.
        world_size: Number of processes.
        device: Device of this rank's tensors.
        tensor_rank: Tensor-parallel rank: its shard of every weight matrix.
        tensor_size: Tensor-parallel size.
        pipeline_rank: Pipeline stage.
        pipeline_size: Number of pipeline stages.
        virtual_size: Number of chunks of layers per stage; 1 without interleaving.
        data_rank: Data-parallel rank: its part of the micro-batches.
        data_size: Data-parallel size.
        expert_rank: Expert-parallel rank: its part of the experts.
        expert_size: Expert-parallel size.
        expert_tensor_rank: Expert-tensor-parallel rank: its shard of every expert's matrices.
        expert_tensor_size: Expert-tensor-parallel size.
        context: Context-parallel rank and size: its chunks of every sequence.
        sequence_parallel: Whether activations between matrices are split over the tensor-parallel ranks.
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


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raises ValueError, naming every field at fault, if the layout does not fit the world size."""
    problems = layout_conflicts(parallel, world_size)
    if problems:
        raise ValueError("\n".join(problems))


_store: dist.Store | None = None
_generation = 0


def initialize(
    parallel: ParallelConfig,
    seed: int,
    environment: Mapping[str, str] | None = None,
    timeout: timedelta = _TIMEOUT,
    start_process_group: Callable[[Launch, timedelta, torch.device], None] | None = None,
) -> RankLayout:
    """Initialises process groups, Megatron's parallel state, the device and every random generator.

    Args:
        parallel: Parallel sizes of the layout.
        seed: Seed, the same on every rank; pipeline stages and Megatron's tracker derive theirs from it.
        environment: Environment variables of the launcher; None: ``os.environ``.
        timeout: Timeout of a collective.
        start_process_group: Function that creates the default group; None: NCCL or gloo over the store of all ranks.

    Raises:
        ValueError: the world size does not fit the layout (before any process group is created), or the launcher's
            environment is incomplete.
        OSError: the port of rank 0 is in use.
        RuntimeError: a layout is initialised already.
    """
    if dist.is_initialized():
        raise RuntimeError("parallel.initialize: process groups exist already; call destroy() first")
    launch = Launch.from_environment(os.environ if environment is None else environment)
    check_world_size(parallel, launch.world_size)
    device = _device(launch)
    if device.type == "cpu":
        cpu_backend.install()
    from megatron.core import parallel_state

    (start_process_group or _start_process_group)(launch, timeout, device)
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


def connect(launch: Launch) -> dist.Store:
    """Connects to the store of all ranks before there are process groups; :func:`initialize` uses the same store.

    Returns:
        A connection of its own, for keys that belong to this start of the job.

    Raises:
        OSError: the port of rank 0 is in use, or rank 0 cannot be reached within half an hour.
    """
    global _store
    if _store is None:
        _store = _rendezvous(launch, _TIMEOUT)
    return dist.PrefixStore(_attempt(), _store.clone())  # type: ignore[attr-defined]  # missing in torch's stubs


def store() -> dist.Store:
    """Returns the store of all ranks of the current layout, for waits that must not happen inside a collective.

    Raises:
        RuntimeError: no layout is initialised.
    """
    if _store is None or not dist.is_initialized():
        raise RuntimeError("parallel.store: call initialize() first")
    # A connection of its own, so that a wait blocks nothing else.
    return dist.PrefixStore(_prefix(), _store.clone())  # type: ignore[attr-defined]  # missing in torch's stubs


def destroy() -> None:
    """Destroys what :func:`initialize` created. Does nothing if no layout is initialised."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # Some launchers make only one GPU visible to each process, which is then number 0.
    index = 0 if visible == 1 else launch.local_rank
    if index >= visible:
        raise ValueError(f"LOCAL_RANK = {launch.local_rank}: there are {visible} GPUs on this host")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _start_process_group(launch: Launch, timeout: timedelta, device: torch.device) -> None:
    """Creates the default group. Every layout, and every restart by torchrun, has its own keys in the one store."""
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


def _attempt() -> str:
    return f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _prefix() -> str:
    return f"{_attempt()}/layout{_generation}"


def _rendezvous(launch: Launch, timeout: timedelta) -> dist.Store:
    try:
        with _waiting_is_logged(launch):
            return dist.TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                is_master=launch.serves_store,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise OSError(
                errno.EADDRINUSE,
                f"MASTER_PORT = {launch.port}: another program listens there on this host; set another one on all "
                "ranks",
            ) from None
        raise ConnectionError(
            f"MASTER_ADDR = {launch.address}, MASTER_PORT = {launch.port}: rank 0 cannot be reached: {error}"
        ) from None


@contextmanager
def _waiting_is_logged(launch: Launch) -> Iterator[None]:
    """Logs at intervals that this rank waits for rank 0, as long as the block runs."""
    connected = threading.Event()

    def log() -> None:
        seconds = _PATIENCE_SECONDS
        while not connected.wait(seconds):
            logger.warning(
                "rank %d waits for rank 0 at %s, port %d (MASTER_ADDR, MASTER_PORT); start all %d ranks",
                launch.rank,
                launch.address,
                launch.port,
                launch.world_size,
            )
            seconds = 6 * _PATIENCE_SECONDS

    thread = threading.Thread(target=log, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        connected.set()
        thread.join()


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
    np.random.seed(seed % 2**32)  # noqa: NPY002 - some libraries draw from it
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
