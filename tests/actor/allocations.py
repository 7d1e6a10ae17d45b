"""Records the tensors that PyTorch operators produce, in forward and backward."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestAllocation(TorchDispatchMode):
    """Records the largest output, in elements, and how often each operator ran.

    Views count as what they show. Tensors made inside an operator are not seen.
    """

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.operator = ""
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.operator = leaf.numel(), str(func)
        return result
