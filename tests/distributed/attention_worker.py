"""Every rank attends over a real process group and compares with all ranks simulated here."""

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.distributed.tensor.debug import CommDebugMode

from fipo_megatron.actor.attention import PackedCoreAttention, exchange_over
from fipo_megatron.actor.attention_kernels import Blocked, CpuFlash
from fipo_megatron.data.context_parallel import CpLayout
from tests.actor.plain_attention import attend, in_simulated_ranks, largest_error, plain_attention, random_case

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_attention(layout):
    """Compares to rounding: gloo adds the gradients of the ranks in another order than the simulation."""
    exchange = exchange_over(dist.group.WORLD)
    for seed, lengths in enumerate([[200], [1], [130, 1, 64, 17], [3, 5]]):
        for dtype, bound in BOUNDS.items():
            for kernel in (CpuFlash(), Blocked(queries=16, keys=32)):
                case = random_case(seed, lengths, layout.size, groups=2, ratio=7, dtype=dtype)
                got = attend(case.of_rank(layout), layout=layout, exchange=exchange, kernel=kernel)
                simulated = in_simulated_ranks(case, layout.size, kernel=kernel)[layout.rank]
                assert torch.equal(got[0], simulated[0])
                assert torch.equal(got[1], simulated[1])
                assert largest_error(got, [tensor.double() for tensor in simulated]) <= min(bound, 1e-2)
                indices = torch.from_numpy(layout.indices(case.cu_seqlens))
                assert largest_error(got, [tensor[indices] for tensor in plain_attention(case)]) <= bound


def check_module(layout):
    """Checks that the module finds its group and accepts views as inputs, which gloo would read wrongly."""
    case = random_case(9, [50, 4], layout.size, groups=2, ratio=2, dtype=torch.float32)
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    config = TransformerConfig(**sizes, attention_dropout=0.0, context_parallel_size=layout.size)
    groups = ProcessGroupCollection(cp=dist.group.WORLD)
    module = PackedCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    mine = case.of_rank(layout)
    mixed = torch.cat([mine.query, mine.key, mine.value], dim=1).requires_grad_()
    boundaries = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q_padded=boundaries)
    with CommDebugMode() as communication:
        out = module(*mixed.split([4, 2, 2], dim=1), None, packed_seq_params=params)
    assert communication.get_total_counts() == 1, communication.get_comm_counts()
    with CommDebugMode() as communication:
        out.backward(mine.grad.flatten(1))
    assert communication.get_total_counts() == 2, communication.get_comm_counts()
    indices = torch.from_numpy(layout.indices(case.cu_seqlens))
    expected = [tensor[indices] for tensor in plain_attention(case)]
    assert largest_error([out.detach()], [expected[0].flatten(1)]) <= 1e-5
    assert largest_error([mixed.grad], [torch.cat(expected[1:], dim=1)]) <= 1e-5


def main() -> None:
    dist.init_process_group("gloo")
    of_this_rank = CpLayout(dist.get_world_size(), dist.get_rank())
    check_attention(of_this_rank)
    check_module(of_this_rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
