"""Configuration: one schema, four sources (flag > environment > TOML file > default), checked once at start."""

from narsil_stream.core.config.access import AccessConfig
from narsil_stream.core.config.schema import (
    BatchConfig,
    Config,
    ExecutorConfig,
    GrpcConfig,
    HttpConfig,
    MetricsConfig,
    NatsConfig,
    TimingConfig,
)
from narsil_stream.core.config.sources import ConfigError, Loaded, changed, check_doors, child_environ, load, to_environ

__all__ = [
    "AccessConfig",
    "BatchConfig",
    "Config",
    "ConfigError",
    "ExecutorConfig",
    "GrpcConfig",
    "HttpConfig",
    "Loaded",
    "MetricsConfig",
    "NatsConfig",
    "TimingConfig",
    "changed",
    "check_doors",
    "child_environ",
    "load",
    "to_environ",
]
