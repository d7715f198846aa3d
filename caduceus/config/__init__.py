"""The configuration of a run. Modules: `keys` defines a key, `run` the sections; `load` reads YAML and overrides."""

from caduceus.config.checks import refuse_cuda_graphs, refuse_strategy
from caduceus.config.data import DataConfig
from caduceus.config.fixed import Change, changes, order_values
from caduceus.config.load import config_from_dict, config_to_dict, has_dial, load_config, overridden, save_config
from caduceus.config.model import CaduceusConfig
from caduceus.config.run import (
    KEYS,
    SECTIONS,
    CheckpointConfig,
    Config,
    OpsConfig,
    ParallelConfig,
    RunConfig,
    ValidConfig,
    WandbConfig,
)
from caduceus.config.stages import Stage, stages_of, within
from caduceus.config.train import StageConfig, TrainConfig

__all__ = [
    "KEYS",
    "SECTIONS",
    "CaduceusConfig",
    "Change",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "OpsConfig",
    "ParallelConfig",
    "RunConfig",
    "Stage",
    "StageConfig",
    "TrainConfig",
    "ValidConfig",
    "WandbConfig",
    "changes",
    "config_from_dict",
    "config_to_dict",
    "has_dial",
    "load_config",
    "order_values",
    "overridden",
    "refuse_cuda_graphs",
    "refuse_strategy",
    "save_config",
    "stages_of",
    "within",
]
