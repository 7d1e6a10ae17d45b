"""The algorithm on a small synthetic batch: what `make quickstart` runs until the training loop is there.

Four prompts with four responses each get rewards, advantages and, as if the policy had just been updated, slightly
moved log-probs. FIPO weighs each token by what happened to its future; DAPO does not. The same batch is then split over
context-parallel ranks and micro-batches, which must not change the loss.
"""

from __future__ import annotations

import numpy as np
import torch

from fipo_megatron.algorithm.advantages import group_advantages
from fipo_megatron.algorithm.future_kl import SequenceShards, future_kl
from fipo_megatron.algorithm.policy_loss import LossInputs, LossOutput, loss_config, policy_loss
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import pack, plan_micro_batches
from fipo_megatron.data.trajectory import Prompt, Trajectory

GROUPS, SAMPLES = 4, 4
SHADES = " .:-=+*#%@"


def synthetic_batch(rng: np.random.Generator) -> list[Trajectory]:
    """Scored responses of 40 to 160 tokens, with advantages."""
    prompts = [Prompt(f"p{number}", rng.integers(1, 1000, 12), "") for number in range(GROUPS)]
    accuracy = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).ravel()
    advantages = group_advantages(torch.tensor(2.0 * accuracy - 1), torch.arange(GROUPS).repeat_interleave(SAMPLES))
    batch = []
    for number in range(GROUPS * SAMPLES):
        n = int(rng.integers(40, 160))
        batch.append(
            Trajectory(
                prompts[number // SAMPLES],
                number % SAMPLES,
                rng.integers(1, 1000, n),
                -rng.gamma(0.5, 1.0, n).astype(np.float32),
                np.ones(n, dtype=bool),
                accuracy=int(accuracy[number]),
                reward=float(2 * accuracy[number] - 1),
                advantage=float(advantages[number]),
            )
        )
    return batch


def moved_log_probs(trajectory: Trajectory, seed: int) -> np.ndarray:
    """New log-probs: right answers became a little likelier towards their end, wrong ones less likely."""
    rng = np.random.default_rng([seed, int(trajectory.prompt.id[1:]), trajectory.sample])
    n = len(trajectory.tokens)
    drift = 0.02 * np.sign(trajectory.advantage or 0.0) * np.linspace(0, 1, n)
    return trajectory.behaviour_log_probs + drift + rng.normal(0, 0.02, n)


def losses(batch: list[Trajectory], kind: str, *, cp: int, budget: int) -> tuple[float, list[LossOutput]]:
    """The loss of the batch, split into micro-batches of ``budget`` tokens over ``cp`` context-parallel ranks."""
    sizes = CpLayout(cp)
    lengths = [sizes.padded_length(len(trajectory)) for trajectory in batch]
    (mini_batch,) = plan_micro_batches(lengths, [range(len(batch))], token_budget=budget)
    outputs: list[LossOutput] = []
    for members in mini_batch.micro_batches[0]:
        packed = pack([batch[i] for i in members], sizes)
        new = np.zeros(len(packed.tokens))
        for start, i in zip(packed.cu_seqlens, members, strict=False):
            first = int(start) + len(batch[i].prompt.tokens) - 1
            new[first : first + len(batch[i].tokens)] = moved_log_probs(batch[i], seed=1)
        inputs = []
        for layout in (CpLayout(cp, rank) for rank in range(cp)):
            part = packed.slice(layout)
            inputs.append(
                LossInputs(
                    torch.from_numpy(layout.slice(new, packed.cu_seqlens)),
                    torch.from_numpy(part.behaviour_log_probs),
                    torch.from_numpy(part.advantages),
                    torch.from_numpy(part.mask),
                    SequenceShards.build(layout.chunk_lengths(packed.cu_seqlens), layout.owners, layout.rank),
                )
            )
        outputs += in_all_ranks(inputs, kind)
    numerator, denominator = (sum(getattr(o, name) for o in outputs) for name in ("numerator", "denominator"))
    return float(numerator / denominator), outputs


def in_all_ranks(inputs: list[LossInputs], kind: str) -> list[LossOutput]:
    """One process plays all ranks: first what each would send, then the loss with what each would receive."""
    messages: list[torch.Tensor] = []

    def send(message: torch.Tensor) -> torch.Tensor:
        messages.append(message)
        return message[None].repeat(len(inputs), 1, 1)

    for each in inputs if len(inputs) > 1 else []:
        policy_loss(each, loss_config(kind), send)
    return [policy_loss(each, loss_config(kind), lambda _: torch.stack(messages)) for each in inputs]


def shade(weights: torch.Tensor, low: float = 1.0, high: float = 1.2) -> str:
    """One character per token, darker for a larger weight."""
    level = ((weights - low) / (high - low) * (len(SHADES) - 1)).round().int().tolist()
    return "".join(SHADES[i] for i in level)


def main() -> None:
    """Prints the comparison."""
    batch = synthetic_batch(np.random.default_rng(0))
    print("This is the algorithm on synthetic numbers; the training loop is not built yet.\n")
    tokens = sum(len(trajectory.tokens) for trajectory in batch)
    print(f"{len(batch)} responses to {GROUPS} prompts, {tokens} tokens\n")
    for kind in ("dapo", "fipo"):
        loss, outputs = losses(batch, kind, cp=1, budget=10_000)
        metrics = outputs[0].statistics.metrics()
        weight = f"weight {metrics['weight_mean']:.3f} (up to {metrics['weight_max']:.3f})" if kind == "fipo" else ""
        print(f"{kind}: loss {loss:+.6f}  policy KL {metrics['policy_kl']:+.5f}  {weight}")

    print("\nThe same batch, split otherwise (the loss may not change):")
    for cp, budget in ((1, 10_000), (1, 400), (2, 400), (4, 700), (8, 200)):
        loss, outputs = losses(batch, "fipo", cp=cp, budget=budget)
        print(f"  CP {cp}, {len(outputs) // cp:2d} micro-batch(es): loss {loss:+.12f}")

    print(f"\nFuture-KL weight along two responses, '{SHADES[0]}' = 1.0 … '{SHADES[-1]}' = 1.2:")
    for trajectory in (batch[0], batch[1]):
        shift = torch.from_numpy(moved_log_probs(trajectory, seed=1) - trajectory.behaviour_log_probs)
        weights = future_kl(shift, half_life=32.0).exp().clamp(1.0, 1.2)
        print(f"  {trajectory.name} A = {trajectory.advantage:+.2f} |{shade(weights)}|")

    print("\nTry next: .venv/bin/python -m fipo_megatron.config examples/configs/fipo_qwen2.5_32b.yaml seed=1")


if __name__ == "__main__":
    main()
