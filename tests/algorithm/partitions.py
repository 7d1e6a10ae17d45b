"""Splits a mini-batch in every way the trainer may split it, and compares the result with the loop of reference.py.

``algorithm`` is a namespace with ``LossInputs``, ``SequenceShards`` and ``policy_loss``: the package itself, or a
mutant of it (test_mutations.py). All ranks of a layout run in this process; their exchange is simulated.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from fipo_megatron.algorithm import future_kl, policy_loss
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import pack, plan_micro_batches
from fipo_megatron.data.trajectory import Prompt, Trajectory
from tests.algorithm import reference

PACKAGE = SimpleNamespace(
    LossInputs=policy_loss.LossInputs,
    SequenceShards=future_kl.SequenceShards,
    policy_loss=policy_loss.policy_loss,
)


def random_batch(seed, size=6, longest=40, spread=0.3, outliers=0.06):
    """Returns responses with a few tokens far above any ratio bound, so that some are dropped and some are kept."""
    rng = np.random.default_rng(seed)
    batch = []
    for index in range(size):
        n = int(rng.integers(1, longest + 1))
        old = -rng.gamma(1.0, 1.0, n)
        far = (rng.random(n) < outliers) * rng.uniform(1.5, 3.0, n) * (index > 0)  # the first is never dropped
        new = old + rng.normal(0, spread, n).clip(-0.9, 0.9) + far
        advantage = float(np.float32(rng.normal() - 0.2))
        mask = rng.random(n) < 0.9
        mask[int(rng.integers(n))] = True
        prompt = Prompt(str(index), rng.integers(1, 100, int(rng.integers(1, 9))), "")
        behaviour = np.minimum(old + rng.normal(0, 0.3, n), 0).astype(np.float32)
        trajectory = Trajectory(prompt, 0, rng.integers(1, 100, n), behaviour, mask, advantage=advantage)
        response = reference.Response(
            new,
            old,
            np.full(n, advantage),
            mask,
            old + rng.normal(0, 0.2, n),
            trajectory.behaviour_log_probs.astype(float),
        )
        batch.append((trajectory, response))
    return batch


def in_all_ranks(algorithm, inputs, config):
    """Returns the outputs of all context-parallel ranks, with the exchange between them simulated."""
    messages = []

    def record(message):
        messages.append(message)
        return message[None].repeat(len(inputs), *[1] * message.ndim)

    if len(inputs) > 1:
        for each in inputs:
            algorithm.policy_loss(each, config, record)
        assert len(messages) == len(inputs), "the loss must exchange exactly once"
    return [algorithm.policy_loss(each, config, lambda _: torch.stack(messages)) for each in inputs]


def local_inputs(algorithm, packed, per_token, layout):
    """Slices whole packed arrays to the inputs of one rank."""
    part = packed.slice(layout)
    indices = torch.from_numpy(layout.indices(packed.cu_seqlens))
    shards = algorithm.SequenceShards.build(layout.chunk_lengths(packed.cu_seqlens), layout.owners, layout.rank)
    return algorithm.LossInputs(
        advantages=torch.from_numpy(part.advantages).double(),
        mask=torch.from_numpy(part.mask),
        shards=shards,
        **{name: values[indices] for name, values in per_token.items()},
    )


def split_gradient(algorithm, batch, config, *, dp=1, cp=1, budget=10_000, multiple_of=1, seed=0):
    """Returns loss, gradients per response, denominator and statistics of the batch under one split."""
    trajectories = [trajectory for trajectory, _ in batch]
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(batch))]
    layout = CpLayout(cp)
    plan = plan_micro_batches(
        [layout.padded_length(len(t)) for t in trajectories],
        [order],
        token_budget=budget,
        data_parallel_size=dp,
    )
    leaves = [torch.tensor(response.new, requires_grad=True) for _, response in batch]
    outputs = []
    for members in (members for rank in plan[0].micro_batches for members in rank):
        packed = pack([trajectories[i] for i in members], layout, multiple_of=multiple_of)
        total = int(packed.cu_seqlens[-1])
        per_token = {
            name: torch.full((total,), -0.5, dtype=torch.float64)
            for name in ("log_probs", "old_log_probs", "reference_log_probs", "behaviour_log_probs")
        }
        for start, i in zip(packed.cu_seqlens[:-1], members, strict=bool(members)):
            trajectory, response = batch[i]
            first = int(start) + len(trajectory.prompt.tokens) - 1
            positions = torch.arange(first, first + len(response.new))
            per_token["log_probs"] = per_token["log_probs"].index_copy(0, positions, leaves[i])
            for name, values in (
                ("old", response.old),
                ("reference", response.reference),
                ("behaviour", response.behaviour),
            ):
                per_token[f"{name}_log_probs"][positions] = torch.from_numpy(values)
        layouts = [CpLayout(cp, rank) for rank in range(cp)]
        outputs += in_all_ranks(
            algorithm, [local_inputs(algorithm, packed, per_token, each) for each in layouts], config
        )
    numerator = sum(output.numerator for output in outputs)
    denominator = sum(output.denominator for output in outputs)
    (numerator / denominator).backward()
    statistics = outputs[0].statistics
    for output in outputs[1:]:
        statistics = statistics + output.statistics
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return (numerator / denominator).item(), [g.numpy() for g in gradients], int(denominator), statistics


def assert_split_matches(algorithm, batch, config, **split):
    """Checks that gradient, loss and denominator under a split equal those of the loop; returns the dropped count."""
    loss, gradients, denominator, statistics = split_gradient(algorithm, batch, config, **split)
    expected_loss, expected, expected_denominator, dropped = reference.mini_batch([r for _, r in batch], config)
    got, want = np.concatenate(gradients), np.concatenate(expected)
    assert denominator == expected_denominator
    assert abs(loss - expected_loss) <= 1e-6 * max(1.0, abs(expected_loss))
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    assert statistics.metrics()["dropped_sequences"] == dropped
    assert statistics.metrics()["sequences"] == len(batch)
    return dropped
