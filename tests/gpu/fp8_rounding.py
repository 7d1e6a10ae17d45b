"""The effect of FP8 alone on a transformers model: the inputs of its linear layers are rounded, on the CPU.

Weights and activations are rounded to E4M3 with the scales of the recipe and multiplied in float32. Embedding,
attention and output layer keep their precision, as under Megatron-Core and Transformer Engine.
"""

import torch

from tests.distributed import layout_cases
from tests.gpu.actors import reference_of, transformers_model

_LARGEST = 448.0
_WIDTH = 128


def log_prob_differences(name, recipe):
    """Returns ``[R]``, by how much FP8 changes the log-prob of each token of the reference's responses."""
    model = transformers_model(name)
    model.load_state_dict(reference_of(name).state)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            by_row, whole = (_by_row, _by_block) if recipe == "blockwise" else (_by_tensor, _by_tensor)
            module.weight.data = whole(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs, rounded=by_row: (rounded(inputs[0]),))
    expected = reference_of(name).expected
    with torch.no_grad():
        found = [layout_cases.response_log_probs(model, t.prompt.tokens, t.tokens) for t in expected.trajectories]
    return torch.cat(found) - torch.cat(expected.log_probs)


def _by_row(tensor):
    """One scale, a power of two, for 128 neighbouring inputs of a token."""
    parts = tensor.unflatten(-1, (-1, _WIDTH))
    return _rounded(parts, _power_of_two(parts.abs().amax(-1, keepdim=True))).flatten(-2)


def _by_block(weight):
    """One scale, a power of two, for a square of the weight."""
    parts = weight.unflatten(1, (-1, _WIDTH)).unflatten(0, (-1, _WIDTH))
    return _rounded(parts, _power_of_two(parts.abs().amax((1, 3), keepdim=True))).flatten(2).flatten(0, 1)


def _by_tensor(tensor):
    return _rounded(tensor, _LARGEST / tensor.abs().max())


def _power_of_two(largest):
    return torch.exp2((_LARGEST / largest).log2().floor())


def _rounded(tensor, scale):
    return (tensor * scale).to(torch.float8_e4m3fn).to(tensor.dtype) / scale
