"""Configuration: one schema, four sources (flag > environment > TOML file > default), checked once at start."""

from narsil_stream.core.config.access import AccessConfig
from narsil_stream.core.config.schema import (
    Config,
    GrpcConfig,
    HttpConfig,
    MetricsConfig,
    NatsConfig,
)
from narsil_stream.core.config.sources import ConfigError, Loaded, changed, check_doors, child_environ, load, to_environ
from narsil_stream.core.config.work import BatchConfig, ExecutorConfig, TimingConfig

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
