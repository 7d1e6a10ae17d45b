"""Memory of one rank's actor over one step, by part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside weights, gradients and optimizer state while a part of the step runs.

    Attributes:
        held: Largest number of bytes that forward passes keep until their backward passes.
        peak: Largest number of bytes that are live at the same time.
    """

    held: int
    peak: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank's actor.

    Attributes:
        parameters: Parameters, padding of their buffers included.
        gradients: Gradient buffers.
        optimizer: Main parameters and moments, after the first step.
        weight_copies: FP8 copies of the weights.
        log_probs: The log-prob pass.
        update: Forward and backward passes of a mini-batch.
        optimizer_step: The optimizer step, without the moments that the first step creates.
    """

    parameters: int
    gradients: int
    optimizer: int
    weight_copies: int
    log_probs: PassMemory
    update: PassMemory
    optimizer_step: PassMemory

    @property
    def kept(self) -> int:
        """Bytes that are kept between the passes."""
        return self.parameters + self.gradients + self.optimizer + self.weight_copies
