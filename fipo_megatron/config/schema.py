"""The complete configuration of a run: all sections and the conflicts between them."""

from __future__ import annotations

from dataclasses import field

from pydantic.dataclasses import dataclass

from fipo_megatron.config.actor_sections import ActorConfig, AlgorithmConfig, ModelConfig, SftConfig
from fipo_megatron.config.checks import find_conflicts
from fipo_megatron.config.field_types import STRICT, Seed
from fipo_megatron.config.rollout_sections import (
    AmplifyConfig,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    RolloutConfig,
)
from fipo_megatron.config.run_sections import CheckpointConfig, CompareConfig, HealthConfig, ObserveConfig, RunConfig


@dataclass(config=STRICT, frozen=True)
class Config:
    """A run.

    Attributes:
        run: Length, output and mode of the run.
        model: The model to train.
        algorithm: The loss and the advantages.
        data: Training prompts.
        actor: The policy and its updates.
        rollout: Sampling of responses.
        reward: The verifier and the length penalty.
        evaluation: Evaluation during training and alone.
        observe: Trackers, trajectory files and console.
        health: The collapse alarm.
        checkpoint: Checkpoints and exports.
        sft: Supervised fine-tuning.
        compare: Comparison of two models.
        amplify: Extrapolation beyond RL at test time.
        seed: Seed of all random numbers of the run.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    amplify: AmplifyConfig = field(default_factory=AmplifyConfig)
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Raises ValueError with a line for every combination of values that cannot work."""
        if problems := find_conflicts(self):
            raise ValueError("\n".join(problems))

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per step of the run."""
        return -(-self.groups_per_step // self.actor.prompts_per_mini_batch)

    @property
    def groups_per_step(self) -> int:
        """Groups of responses per step; examples if ``algorithm.kind = sft``."""
        return self.sft.examples_per_step if self.algorithm.kind == "sft" else self.rollout.prompts_per_step
