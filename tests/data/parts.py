"""Reassembly of packed arrays that context parallelism has split, for comparisons."""

import numpy as np

from fipo_megatron.data.context_parallel import CpLayout


def unslice(parts, cu_seqlens):
    """Returns the packed array ``[T, ...]`` of the parts of all ranks, in rank order: inverts ``CpLayout.slice``."""
    packed = np.empty((int(np.asarray(cu_seqlens)[-1]), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        packed[CpLayout(len(parts), rank).indices(cu_seqlens)] = part
    return packed
