"""Tensor-parallel log-probs over real gloo ranks, against one rank that holds the whole output layer.

Four ranks, first as two tensor-parallel groups of 2, then as one of 4. Every assertion runs on every rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.tensor.debug import CommDebugMode

from fipo_megatron.actor import cpu_backend
from fipo_megatron.actor.log_probs import megatron_token_log_probs, token_log_probs
from tests.actor.allocations import LargestAllocation
from tests.actor.plain_log_probs import plain_log_probs, random_problem, relative_error, with_gradients

SEQUENCE, BATCH, WIDTH, COLUMNS = 24, 2, 10, 48
OPTIONS = {"temperature": 0.7, "chunk_tokens": 7, "with_entropy": True}
CASES = [
    # dtype, true vocabulary (30 and 5: the last ranks have only padding), bound
    (torch.float64, 48, 1e-12),
    (torch.float64, 41, 1e-12),
    (torch.float64, 30, 1e-12),
    (torch.float64, 5, 1e-12),
    (torch.float32, 41, 1e-5),
    (torch.bfloat16, 41, 2e-2),
]


def rows_of(weight, group):
    return weight.chunk(group.size())[group.rank()]


def reference(hidden, weight, labels, vocab_size):
    plain = partial(plain_log_probs, temperature=OPTIONS["temperature"], vocab_size=vocab_size)
    return with_gradients(plain, hidden.double(), weight.double(), labels)


def check_function(group, dtype, vocab_size, bound):
    """Checks values on every rank, and the gradient of hidden after a sum over the group."""
    hidden, weight, labels = random_problem(1, SEQUENCE, COLUMNS, WIDTH, vocab_size, dtype)
    sharded = partial(token_log_probs, group=group, vocab_size=vocab_size, **OPTIONS)
    got = with_gradients(sharded, hidden, rows_of(weight, group), labels)
    want = reference(hidden, weight, labels, vocab_size)
    assert relative_error(got["log_probs"], want["log_probs"]) <= bound
    assert relative_error(got["entropy"], want["entropy"]) <= bound
    assert relative_error(got["grad_weight"], rows_of(want["grad_weight"], group)) <= bound
    if vocab_size > COLUMNS // group.size():  # otherwise the first rank holds all columns that are not padding
        assert relative_error(got["grad_hidden"], want["grad_hidden"]) > 0.1, "documented as partial"
    dist.all_reduce(got["grad_hidden"], group=group)
    assert relative_error(got["grad_hidden"], want["grad_hidden"]) <= bound

    first = got["log_probs"].clone()
    dist.broadcast(first, group=group, group_src=0)
    assert torch.equal(first, got["log_probs"]), "all ranks must hold the same bits"


def check_megatron(group, sequence_parallel, dtype, vocab_size, bound):
    """Checks that Megatron's mapping completes the gradient of hidden (under SP, that of this rank's part)."""
    hidden, weight, labels = random_problem(2, SEQUENCE * BATCH, COLUMNS, WIDTH, vocab_size, dtype)
    want = reference(hidden, weight, labels, vocab_size)
    hidden_SBH = hidden.view(SEQUENCE, BATCH, WIDTH)
    labels_BS = labels.view(SEQUENCE, BATCH).t()

    def mapped(hidden, weight, _):
        result = megatron_token_log_probs(
            hidden,
            weight,
            labels_BS,
            group=group,
            sequence_parallel=sequence_parallel,
            vocab_size=vocab_size,
            **OPTIONS,
        )
        assert result.log_probs.shape == result.entropy.shape == (BATCH, SEQUENCE)
        return type(result)(result.log_probs.t().reshape(-1), result.entropy.t().reshape(-1))

    local = rows_of(hidden_SBH, group) if sequence_parallel else hidden_SBH
    got = with_gradients(mapped, local, rows_of(weight, group), labels)
    grad_hidden = want["grad_hidden"].view_as(hidden_SBH)
    want["grad_hidden"] = rows_of(grad_hidden, group) if sequence_parallel else grad_hidden
    want["grad_weight"] = rows_of(want["grad_weight"], group)
    for name, value in want.items():
        assert relative_error(got[name], value) <= bound, name


def check_collectives(group, sequence_parallel):
    """Counts one in forward with any chunks; the mapping adds one in backward, and under SP one in forward."""
    hidden, weight, labels = random_problem(3, SEQUENCE, COLUMNS, WIDTH)
    leaf, shard = hidden.requires_grad_(), rows_of(weight, group).clone().requires_grad_()
    with CommDebugMode() as forward:
        result = token_log_probs(leaf, shard, labels, group=group, **OPTIONS)
    with CommDebugMode() as backward:
        (result.log_probs.sum() + result.entropy.sum()).backward()
    assert (forward.get_total_counts(), backward.get_total_counts()) == (1, 0), forward.get_comm_counts()

    hidden_SBH = hidden.detach()[:, None]
    local = rows_of(hidden_SBH, group) if sequence_parallel else hidden_SBH
    leaf = local.clone().requires_grad_()
    with CommDebugMode() as forward:
        result = megatron_token_log_probs(
            leaf, shard, labels[None], group=group, sequence_parallel=sequence_parallel, **OPTIONS
        )
    with CommDebugMode() as backward:
        result.log_probs.sum().backward()
    assert forward.get_total_counts() == 1 + sequence_parallel, forward.get_comm_counts()
    assert backward.get_total_counts() == 1, backward.get_comm_counts()


def check_no_tokens(group):
    """Checks that an empty shard takes part in the collective."""
    hidden, weight, labels = random_problem(4, 0, COLUMNS, WIDTH)
    got = with_gradients(partial(token_log_probs, group=group, **OPTIONS), hidden, rows_of(weight, group), labels)
    assert got["log_probs"].shape == (0,)
    assert not got["grad_weight"].any()


def check_memory(group):
    """Checks that neither forward nor backward allocates tokens × this rank's columns."""
    tokens, columns = 256, 128 * group.size()
    hidden, weight, labels = random_problem(5, tokens, columns, WIDTH)
    with LargestAllocation() as seen:
        sharded = partial(token_log_probs, group=group, chunk_tokens=16, with_entropy=True)
        with_gradients(sharded, hidden, rows_of(weight, group), labels)
    assert seen.calls["aten.mm.default"] >= tokens // 16
    assert seen.elements <= max(16 * 128, tokens * WIDTH, tokens * 4 * group.size()), seen.operator


def main():
    dist.init_process_group("gloo")
    cpu_backend.install()
    torch.set_num_threads(1)
    for size in (2, 4):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        group = parallel_state.get_tensor_model_parallel_group()
        assert group.size() == size
        for case in CASES:
            check_function(group, *case)
            for sequence_parallel in (False, True):
                check_megatron(group, sequence_parallel, *case)
        for sequence_parallel in (False, True):
            check_collectives(group, sequence_parallel)
        check_no_tokens(group)
        check_memory(group)
        if dist.get_rank() == 0:
            print(f"tensor parallel {size}: {len(CASES)} cases", flush=True)
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
