"""Configuration of an experiment: `load_config` is the way in, `Config` the result.

The schema stands in `config_schema.py` and `config_run.py`, the rules in `config_check.py`.
"""

from gcahng.training.config_help import settings_help
from gcahng.training.config_load import (
    check_config,
    config_from_mapping,
    load_config,
    resolved_yaml,
)
from gcahng.training.config_run import EvalConfig, HealthConfig, MonitorConfig, RunConfig, TrainConfig
from gcahng.training.config_schema import (
    BatchConfig,
    Config,
    DataConfig,
    GenerationConfig,
    GenerationWeights,
    GraphConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OptimizerConfig,
    ScheduleConfig,
    TransformConfig,
)

__all__ = [
    "BatchConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GenerationConfig",
    "GenerationWeights",
    "GraphConfig",
    "HealthConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TransformConfig",
    "check_config",
    "config_from_mapping",
    "load_config",
    "resolved_yaml",
    "settings_help",
]
