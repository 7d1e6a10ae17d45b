"""Leaves out one adaptation of ``cpu_backend`` after the other and runs a real Megatron operation that needs it.

    python -m tests.distributed.cpu_adaptations RESULTS.json

Megatron is imported once; every trial is a fork of one process per rank, which installs the other adaptations first.
The results say, for every adaptation, the error of each rank without it, and for every operation the errors with all.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

with warnings.catch_warnings(action="ignore"):
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from fipo_megatron.actor import cpu_backend, parallel
    from fipo_megatron.actor.model import build_model
    from fipo_megatron.actor.optimizer import build_optimizer, wrap_for_training
    from fipo_megatron.config import ActorConfig, ParallelConfig
    from fipo_megatron.weights.architecture import FAMILIES, Architecture, Mixture, Rope

DENSE = Architecture(
    name="Qwen2ForCausalLM",
    family=FAMILIES["Qwen2ForCausalLM"],
    hidden=16,
    layers=2,
    heads=2,
    kv_groups=2,
    head_dim=8,
    ffn=16,
    vocab=32,
    norm_epsilon=1e-6,
    tied=True,
    max_positions=32,
    rope=Rope(),
)
MIXTURE = replace(DENSE, mixture=Mixture(experts=4, top_k=2, ffn=16, normalised=True, layers=(True, True)))


PLAIN = ActorConfig(dtype="float32", distributed_optimizer=False)


@dataclass(frozen=True, eq=False)
class Operation:
    """A Megatron operation that needs some of the adaptations."""

    run: Callable[["Operation"], None]
    ranks: int = 1
    architecture: Architecture = DENSE
    actor: ActorConfig = PLAIN


def train(operation: Operation) -> None:
    """Takes one optimizer step of a tiny model."""
    actor = operation.actor
    layout = parallel.initialize(actor.parallel, seed=1)
    wrapped = wrap_for_training(build_model(operation.architecture, actor, layout), actor)
    optimizer, schedule = build_optimizer(wrapped, actor)
    tokens = 8
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, cu_seqlens, cu_seqlens, tokens, tokens)

    def loss(hidden):
        return hidden.float().square().sum(), torch.tensor(tokens, dtype=torch.int), {}

    def forward_step(batches, model):
        ids = next(batches)
        return model(ids, torch.arange(tokens)[None], None, packed_seq_params=packed), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([torch.arange(tokens)[None]]),
        model=wrapped[0],
        num_microbatches=1,
        seq_length=tokens,
        micro_batch_size=1,
    )
    schedule.step(1)
    succeeded, _, _ = optimizer.step()
    assert succeeded


def draw(operation: Operation) -> None:
    """Checks that the tensor-parallel generator draws from its own seed and leaves the default generator alone."""
    parallel.initialize(operation.actor.parallel, seed=1)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1 + 2718)))
    assert torch.equal(torch.get_rng_state(), before)


def _actor(**changes) -> ActorConfig:
    layout = {key: changes.pop(key) for key in list(changes) if key in ParallelConfig.__dataclass_fields__}
    return replace(PLAIN, parallel=ParallelConfig(**layout), **changes)


DRAW = Operation(draw)
TRAIN = Operation(train)
TRAIN_BF16 = Operation(train, actor=_actor(dtype="bfloat16"))
TRAIN_DISTRIBUTED = Operation(train, actor=_actor(distributed_optimizer=True))
TRAIN_SEQUENCE_PARALLEL = Operation(train, 2, actor=_actor(tensor_parallel=2, sequence_parallel=True))
TRAIN_PIPELINE = Operation(train, 2, actor=_actor(pipeline_parallel=2))
TRAIN_EXPERTS = Operation(train, 2, MIXTURE, _actor(expert_parallel=2))

NEEDED_FOR = {
    "tensor_parallel.random:torch": DRAW,
    "tensor_parallel.random:_set_cuda_rng_state": DRAW,
    "tensor_parallel.mappings:torch": TRAIN_SEQUENCE_PARALLEL,
    "tensor_parallel.layers:torch": TRAIN_SEQUENCE_PARALLEL,
    "utils:torch": TRAIN_SEQUENCE_PARALLEL,
    "pipeline_parallel.p2p_communication:torch": TRAIN_PIPELINE,
    "pipeline_parallel.schedules:torch": TRAIN,
    "distributed.param_and_grad_buffer:torch": TRAIN,
    "optimizer.optimizer:torch": TRAIN,
    "optimizer.clip_grads:torch": TRAIN,
    "Tensor.type in optimizer.clip_grads": TRAIN,
    "Tensor.type in optimizer.optimizer": TRAIN_BF16,
    "Tensor.type in optimizer.distrib_optimizer": TRAIN_DISTRIBUTED,
    "Tensor.cuda in models.common.language_module.language_module": TRAIN_PIPELINE,
    "transformer.moe.router:torch": TRAIN_EXPERTS,
    "transformer.moe.moe_utils:te_general_gemm": TRAIN_EXPERTS,
    "transformer.moe.token_dispatcher:torch": TRAIN_EXPERTS,
    "transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": TRAIN_EXPERTS,
}


def attempt(operation: Operation, without: frozenset[str]) -> list[list[str]]:
    """Returns for each rank the Megatron lines of the traceback and the error; an empty list if it succeeded."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as directory:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        reports = [Path(directory) / str(rank) for rank in range(operation.ranks)]
        children = [_fork(operation, without, rank, port, report) for rank, report in enumerate(reports)]
        _wait(children)
        return [json.loads(report.read_text()) if report.exists() else ["killed"] for report in reports]


def _fork(operation: Operation, without: frozenset[str], rank: int, port: int, report: Path) -> int:
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(operation.ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            cpu_backend.install(without)
            operation.run(operation)
        found = []
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        found = [f"{f.filename.rpartition('megatron/core/')[2]}:{f.lineno}" for f in frames]
        found.append(f"{type(error).__name__}: {str(error)[:200]}")
    report.write_text(json.dumps(found))
    os._exit(bool(found))


def _wait(children: list[int], grace_seconds: float = 3.0) -> None:
    """Waits until all have ended; kills those that still wait for a rank that failed."""
    left, deadline = list(children), time.monotonic() + 60.0
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.remove(child)
                if status:
                    deadline = min(deadline, time.monotonic() + grace_seconds)
        if left and time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)


def main(results: str) -> None:
    """Writes ``{"with all": {operation: errors}, "without": {adaptation: errors}}``, errors by rank."""
    operations = {str(number): operation for number, operation in enumerate(dict.fromkeys(NEEDED_FOR.values()))}
    found = {
        "with all": {name: attempt(operation, frozenset()) for name, operation in operations.items()},
        "without": {name: attempt(operation, frozenset([name])) for name, operation in NEEDED_FOR.items()},
    }
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
