"""The configuration of a run: typed dataclasses, one per section, from YAML files and dotted overrides.

A file may name another one with ``base:`` (relative to itself) and then contains only the differences.
``algorithm.kind`` selects the defaults of its section (see :data:`.algorithm.policy_loss_config.KIND_DEFAULTS`); files
and overrides take precedence over them. Everything is checked before anything expensive starts: first all keys, types
and values, then their combinations.
"""

from fipo_megatron.config.actor_sections import (
    ActorConfig,
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SftConfig,
)
from fipo_megatron.config.checks import layout_conflicts, notices
from fipo_megatron.config.files import ConfigError, as_dict, keys, load_config
from fipo_megatron.config.rollout_sections import (
    AmplifyConfig,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    RolloutConfig,
    ServersConfig,
)
from fipo_megatron.config.run_sections import CheckpointConfig, CompareConfig, HealthConfig, ObserveConfig, RunConfig
from fipo_megatron.config.schema import Config

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "AmplifyConfig",
    "CheckpointConfig",
    "CompareConfig",
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
