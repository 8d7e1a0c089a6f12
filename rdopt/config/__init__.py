"""Room 1, config: what a run is told, as frozen dataclasses, and the refusals a user can read."""

from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml, load_config, parse_overrides, to_dict
from rdopt.config.schema import (
    Config,
    EncodeConfig,
    EvaluateConfig,
    Grid,
    Option,
    SweepConfig,
    TextConfig,
    TrainConfig,
    options,
)

__all__ = [
    "Config",
    "EncodeConfig",
    "EvaluateConfig",
    "Grid",
    "Option",
    "SweepConfig",
    "TextConfig",
    "TrainConfig",
    "UserError",
    "config_yaml",
    "load_config",
    "options",
    "parse_overrides",
    "to_dict",
]
