"""Sets up and destroys one layout after the other on two ranks, under torchrun."""

import os
import warnings

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.config import ParallelConfig

RANKS_DIFFER = {
    "tensor_rank": {"tensor_parallel": 2, "sequence_parallel": True},
    "pipeline_rank": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "context": {"context_parallel": 2},
    "expert_rank": {"expert_parallel": 2},
}


def main() -> None:
    warnings.simplefilter("ignore")
    for attribute, sizes in RANKS_DIFFER.items():
        layout = parallel.initialize(ParallelConfig(**sizes), seed=1)
        mine = layout.context.rank if attribute == "context" else getattr(layout, attribute)
        assert mine == layout.rank
        assert layout.data_size == (2 if attribute == "expert_rank" else 1)
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == 2
        parallel.destroy()
    if os.environ["RANK"] == "0":
        print(len(RANKS_DIFFER), "layouts")


if __name__ == "__main__":
    main()
