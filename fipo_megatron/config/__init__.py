"""The configuration of a run: typed dataclasses, one per room, from YAML and dotted overrides.

A file may name another with ``base:`` (relative to itself) and then holds only what differs. ``algorithm.kind``
chooses the defaults of its room (see :data:`.policy_loss_config.KIND_DEFAULTS`); what the files and overrides say
wins over them. Everything is checked before anything expensive starts: all keys, types and values at once, then how
they go together.
"""

from fipo_megatron.config.checks import layout_conflicts, notices
from fipo_megatron.config.files import ConfigError, as_dict, keys, load_config
from fipo_megatron.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    CheckpointConfig,
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
    SftConfig,
)

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
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
    "SftConfig",
    "as_dict",
    "keys",
    "layout_conflicts",
    "load_config",
    "notices",
]
