"""The log-probs with all logits in memory, by torch's own log_softmax and autograd."""

from __future__ import annotations

import torch

from fipo_megatron.actor.log_probs import TokenLogProbs


def plain_log_probs(hidden, weight, labels, temperature=1.0, vocab_size=None):
    """Returns log-probs and entropy of ``[T]`` labels without padding columns."""
    logits = (hidden @ weight.t())[:, :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    return TokenLogProbs(log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))


def random_problem(seed, tokens, columns, width, vocab_size=None, dtype=torch.float64, spread=1.0):
    """Returns hidden states, output weight and labels whose logits have a standard deviation of ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=generator, dtype=torch.float64) * (spread / width**0.5)
    labels = torch.randint(vocab_size or columns, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def with_gradients(compute, hidden, weight, labels, seed=0, use=(True, True)):
    """Returns ``compute(hidden, weight, labels)`` and the gradients of a random combination of log-probs and entropy.

    Args:
        compute: Function that returns TokenLogProbs.
        hidden: Hidden states; a leaf is made of them.
        weight: Output weight; a leaf is made of it.
        labels: Labels.
        seed: Seed of the combination.
        use: Whether log-probs and entropy take part in the combination.
    """
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    result = compute(hidden, weight, labels)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for values, used in zip((result.log_probs, result.entropy), use, strict=True):
        upstream = torch.randn(labels.shape, generator=generator, dtype=torch.float64)
        if used:
            loss = loss + (values.double() * upstream).sum()
    loss.backward()
    entropy = None if result.entropy is None else result.entropy.detach()
    return {
        "log_probs": result.log_probs.detach(),
        "entropy": entropy,
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


def relative_error(got, want):
    """Returns the largest difference over the largest expected magnitude, at least 0.01 for values near zero."""
    if want.numel() == 0:
        return 0.0 if got.shape == want.shape else float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-2))
