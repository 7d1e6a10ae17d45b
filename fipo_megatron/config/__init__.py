"""The configuration of a run: typed dataclasses, one per room, from YAML and dotted overrides.

A file may name another with ``base:`` (relative to itself) and then holds only what differs. ``algorithm.kind``
chooses the defaults of its room (see :data:`.algorithm.policy_loss.KIND_DEFAULTS`); what the files and overrides say
wins over them. Everything is checked before anything expensive starts: all keys, types and values at once, then how
they go together.
"""

from fipo_megatron.config.checks import notices
from fipo_megatron.config.files import ConfigError, keys, load_config
from fipo_megatron.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HealthConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ServersConfig,
)

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "HealthConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ServersConfig",
    "keys",
    "load_config",
    "notices",
]
