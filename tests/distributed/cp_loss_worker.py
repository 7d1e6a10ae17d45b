"""Every rank computes its part of the loss over a real process group and compares with all ranks simulated here."""

import inspect
import math
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.distributed.tensor.debug import CommDebugMode

from fipo_megatron.algorithm.future_kl import gather_over
from fipo_megatron.algorithm.policy_loss import policy_loss
from fipo_megatron.algorithm.policy_loss_config import loss_config
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import pack
from tests.algorithm.partitions import PACKAGE, in_all_ranks, local_inputs, random_batch

CONFIGS = [
    loss_config("fipo", dual_clip=3.0, weight_clip=None),
    loss_config("fipo", dual_clip=3.0, half_life=256.0, aggregation="sequence_mean"),
    loss_config("dapo", dual_clip=3.0),
]


def micro_batch(seed, size):
    """Returns the inputs of all ranks for one packed micro-batch; from seed 3 on, some shards are empty."""
    batch = random_batch(seed, size=4, longest=80 if seed < 3 else 2)
    packed = pack([trajectory for trajectory, _ in batch], CpLayout(size))
    total = int(packed.cu_seqlens[-1])
    old, new = (torch.zeros(total, dtype=torch.float64) for _ in range(2))
    for start, (trajectory, response) in zip(packed.cu_seqlens, batch, strict=False):
        first = int(start) + len(trajectory.prompt.tokens) - 1
        old[first : first + len(response.old)] = torch.from_numpy(response.old)
        new[first : first + len(response.new)] = torch.from_numpy(response.new)
    per_token = {"log_probs": new, "old_log_probs": old}
    return [local_inputs(PACKAGE, packed, per_token, CpLayout(size, rank)) for rank in range(size)]


def check_loss(rank, size):
    for config in CONFIGS:
        for seed in range(5):
            inputs = micro_batch(seed, size)
            leaf = inputs[rank].log_probs.clone().requires_grad_()
            with CommDebugMode() as communication:
                mine = policy_loss(replace(inputs[rank], log_probs=leaf), config, gather_over(dist.group.WORLD))
            assert communication.get_total_counts() == 1, communication.get_comm_counts()
            with CommDebugMode() as communication:
                mine.numerator.backward()
            assert communication.get_total_counts() == 0, communication.get_comm_counts()
            simulated = in_all_ranks(PACKAGE, inputs, config)
            assert torch.equal(mine.future_kl, simulated[rank].future_kl)
            assert torch.equal(mine.numerator.detach(), simulated[rank].numerator)
            assert torch.equal(mine.denominator, simulated[rank].denominator)
            merged = simulated[0].statistics
            for other in simulated[1:]:
                merged = merged + other.statistics
            reduced = mine.statistics.all_reduce()
            assert torch.allclose(reduced.sums, merged.sums, rtol=1e-14, atol=1e-14)
            assert torch.equal(reduced.maxima, merged.maxima)
            assert torch.equal(reduced.histograms, merged.histograms)


def check_nan_survives_the_merge(rank, size):
    """Checks that a NaN on any rank is in the maximum over ranks."""
    for poisoned in range(size):
        inputs = micro_batch(0, size)[rank]
        if rank == poisoned:
            values = torch.where(inputs.mask, torch.nan, inputs.log_probs)
            inputs = replace(inputs, log_probs=values)
        output = policy_loss(inputs, CONFIGS[0], gather_over(dist.group.WORLD))
        metrics = output.statistics.all_reduce().metrics()
        assert not math.isfinite(metrics["shift_abs_max"])
        assert not math.isfinite(metrics["policy_kl"])


def check_layout_is_megatrons(rank, size):
    whole = torch.arange(12 * size)
    newer = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters  # Megatron-Core 0.19
    options = {"is_hybrid_cp": False} if newer else {}
    theirs = get_batch_on_this_cp_rank({"tokens": whole[None]}, cp_group=dist.group.WORLD, **options)["tokens"][0]
    assert CpLayout(size, rank).slice(whole.numpy(), [0, len(whole)]).tolist() == theirs.tolist()


def main() -> None:
    dist.init_process_group("gloo")
    check_loss(dist.get_rank(), dist.get_world_size())
    check_nan_survives_the_merge(dist.get_rank(), dist.get_world_size())
    check_layout_is_megatrons(dist.get_rank(), dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
