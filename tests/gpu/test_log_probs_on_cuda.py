"""Chunked log-probs on CUDA: against all logits in float64, in flat memory, without a wait for the device."""

from functools import partial

import pytest
import torch

from fipo_megatron.actor.log_probs import TokenLogProbs, token_log_probs
from tests.actor.plain_log_probs import plain_log_probs, random_problem, relative_error, with_gradients
from tests.gpu.cuda_checks import no_sync, peak_bytes

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def on(device, compute):
    """``compute`` on the device, from and to the CPU; gradients flow back the same way."""

    def moved(*problem):
        found = compute(*(tensor.to(device) for tensor in problem))
        return TokenLogProbs(found.log_probs.cpu(), None if found.entropy is None else found.entropy.cpu())

    return moved


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_equals_all_logits_in_float64(dtype, temperature, device):
    hidden, weight, labels = random_problem(0, 2000, 5000, 128, vocab_size=4990, dtype=dtype)
    options = {"temperature": temperature, "vocab_size": 4990}
    chunked = partial(token_log_probs, with_entropy=True, chunk_tokens=300, **options)
    got = with_gradients(on(device, chunked), hidden, weight, labels)
    plain = on(device, partial(plain_log_probs, **options))
    want = with_gradients(plain, hidden.double(), weight.double(), labels)
    for name in want:
        assert relative_error(got[name], want[name]) <= BOUNDS[dtype], name


def test_bfloat16_rounds_logits_and_nothing_else(device):
    """Against bfloat16 logits with a float32 softmax: the same values."""
    problem = [tensor.to(device) for tensor in random_problem(3, 512, 4096, 64, dtype=torch.bfloat16)]
    got = token_log_probs(*problem, with_entropy=True, chunk_tokens=512)
    want = plain_log_probs(*problem)
    assert got.log_probs.dtype == torch.float32
    assert relative_error(got.log_probs, want.log_probs) <= 2e-6
    assert relative_error(got.entropy, want.entropy) <= 2e-6


def forward_backward(problem):
    hidden, weight, labels = problem
    hidden.grad = weight.grad = None
    token_log_probs(hidden, weight, labels, with_entropy=True).log_probs.sum().backward()


def leaves(device, tokens, columns, width):
    hidden, weight, labels = random_problem(0, tokens, columns, width, dtype=torch.bfloat16)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)


def test_memory_does_not_grow_with_logits(device):
    """From 4k to 32k tokens only the gradient of the hidden states and some numbers per token grow."""
    width, peaks = 256, {}
    for tokens in (4096, 32_768):
        problem = leaves(device, tokens, 32_000, width)
        forward_backward(problem)
        problem[0].grad = problem[1].grad = None
        peaks[tokens] = peak_bytes(lambda problem=problem: forward_backward(problem))
    per_token = (peaks[32_768] - peaks[4096]) / (32_768 - 4096)
    assert per_token <= 2 * width + 128, peaks
    assert peaks[32_768] <= 1024 * 32_000 * 16 + 32_768 * (2 * width + 128), "a chunk of 1,024 in a few copies"


def test_host_never_waits(device):
    problem = leaves(device, 3000, 4000, 64)
    forward_backward(problem)
    with no_sync():
        forward_backward(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_twice_and_without_gradients(dtype, device):
    problem = [tensor.to(device) for tensor in random_problem(8, 3000, 4000, 64, dtype=dtype)]
    recorded = token_log_probs(problem[0].requires_grad_(), *problem[1:]).log_probs
    with torch.no_grad():
        plain = token_log_probs(*problem, with_entropy=True).log_probs
    assert torch.equal(recorded, plain)
