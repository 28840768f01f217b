"""From flags, environment, file and defaults to one checked `Config`. What was refused says where it came from."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from narsil_stream.core.config.doors import open_doors
from narsil_stream.core.config.rules import Broken, broken
from narsil_stream.core.config.schema import Config, default_data_dir, home
from narsil_stream.core.config.settings import PREFIX, Setting, sections, settings, toml_scalar

DEFAULT = "default"
CONFIG_VARIABLE = PREFIX + "CONFIG"
NOT_SETTINGS = (CONFIG_VARIABLE, PREFIX + "TEST_DATA")

SERVICE_LINK = re.compile(
    r"NARSIL_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""What Kubernetes sets in every pod for a Service whose name begins with "narsil"."""
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


class ConfigError(Exception):
    """The configuration cannot be used. The message is written for the person who wrote it, one line a problem."""


class Loaded(Struct, frozen=True):
    """A checked configuration and where its values came from."""

    config: Config
    sources: dict[str, str] = {}
    """Key to source ("flag --http-port", "variable NARSIL_HTTP_PORT", "file narsil.toml") of what is not a default."""

    def source(self, key: str) -> str:
        return self.sources.get(key, DEFAULT)


class _Given(Struct, frozen=True):
    """A value that somebody gave, before any check."""

    value: Any
    source: str
    strict: bool = True
    """False where all values are text, as in the environment."""


class _Found(Struct):
    """What the sources hold together; later ones win."""

    given: dict[str, _Given] = {}
    problems: list[str] = []

    def unknown(self, name: str, source: str, known: Iterable[str]) -> None:
        """The value may be a secret under a mistyped name: it is not shown."""
        names = list(known)
        near = [key for key in names if key.endswith("." + name)] or get_close_matches(name, names, n=1)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        self.problems.append(f"unknown setting {name} ({source}){hint}")


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """Merge flag > environment > TOML file > default and check the result once.

    `file` wins over the variable NARSIL_CONFIG. `flags` maps keys ("http.port") to values; None is "not given".
    """
    found = _Found()
    path = file or (Path(name) if (name := environ.get(CONFIG_VARIABLE)) else None)
    if path is not None:
        _from_file(path, found)
    _from_environ(environ, found)
    _from_flags(flags, found)
    values = dict(_converted(found, home(environ)))
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    values.setdefault("data_dir", default_data_dir(environ))
    loaded = Loaded(_built(values), {key: given.source for key, given in found.given.items()})
    _refuse(loaded, broken(loaded.config))
    return loaded


def changed(base: Config, changes: Mapping[str, object], source: str) -> Config:
    """`base` with other values of live settings, text or their own types. Raises `ConfigError`, with all reasons."""
    found = _Found()
    for key, value in changes.items():
        setting = settings().get(key)
        if setting is None:
            found.unknown(key, source, settings())
        elif not setting.live:
            live = ", ".join(setting.key for setting in settings().values() if setting.live)
            found.problems.append(f"{key} ({source}) does not change while actors run; these do: {live}")
        else:
            found.given[key] = _Given(value, source, strict=not isinstance(value, str))
    converted = dict(_converted(found, Path()))
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    config = base
    for key, value in converted.items():
        section = getattr(config, settings()[key].section)
        part = structs.replace(section, **{settings()[key].name: value})
        config = structs.replace(config, **{settings()[key].section: part})
    _refuse(Loaded(config, dict.fromkeys(changes, source)), broken(config))
    return config


def check_doors(loaded: Loaded, *doors: str) -> None:
    """Raises `ConfigError` if a door that is to be opened would let in whoever reaches it; see `doors.open_doors`."""
    _refuse(loaded, open_doors(loaded.config, doors))


def to_environ(config: Config) -> dict[str, str]:
    """The variables that make `load` give `config` again: those that are not defaults. They include secrets."""
    plain = Config()
    pairs = ((setting, setting.of(config)) for setting in settings().values())
    changed = ((setting.variable, value) for setting, value in pairs if value != setting.of(plain))
    return {variable: value if isinstance(value, str) else toml_scalar(value) for variable, value in changed}


def child_environ(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process that is to run with exactly `config`, whatever file or variables we were given."""
    ours = {setting.variable for setting in settings().values()} | {CONFIG_VARIABLE}
    return {name: value for name, value in environ.items() if name not in ours} | to_environ(config)


def _from_file(path: Path, found: _Found) -> None:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: not valid TOML: {error}") from None
    source = f"file {path}"
    for key, value in _flat(data, source, found):
        if key in settings():
            found.given[key] = _Given(value, source)
        else:
            found.unknown(key, source, [*settings(), *sections()])


def _flat(data: dict[str, Any], source: str, found: _Found) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if name not in sections():
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{field}", inner) for field, inner in value.items())
        else:
            found.problems.append(f"{name} ({source}): expected a table, [{name}]")


def _from_environ(environ: Mapping[str, str], found: _Found) -> None:
    """An empty variable counts as not set: that is how compose files and shells spell "nothing"."""
    by_variable = {setting.variable: setting for setting in settings().values()}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in NOT_SETTINGS or not value:
            continue
        setting = by_variable.get(name)
        address = name.endswith("_PORT") and SERVICE_ADDRESS.fullmatch(value)
        if setting is None:
            if not (address or SERVICE_LINK.fullmatch(name)):
                found.unknown(name, "environment", by_variable)
        elif address:
            found.problems.append(_service_link(name, value))
        else:
            found.given[setting.key] = _Given(value, f"variable {name}", strict=False)


def _service_link(variable: str, value: str) -> str:
    service = variable.removesuffix("_PORT").lower().replace("_", "-")
    return (
        f'{variable} = "{value}": expected a port, and this is what Kubernetes sets for a Service named "{service}"; '
        "put `enableServiceLinks: false` into the pod's spec"
    )


def _from_flags(flags: Mapping[str, object], found: _Found) -> None:
    for key, value in flags.items():
        if value is not None:
            found.given[key] = _Given(value, f"flag {settings()[key].flag}", strict=False)


def _converted(found: _Found, user_home: Path) -> Iterator[tuple[str, Any]]:
    for key, given in found.given.items():
        setting = settings()[key]
        plain = given.value
        if setting.unit and isinstance(plain, str):
            plain = plain.removesuffix(setting.unit).rstrip()
        try:
            value = msgspec.convert(plain, setting.type, strict=given.strict)
        except msgspec.ValidationError:
            found.problems.append(f"{_told(setting, given.value, given.source)}: expected {setting.expected}")
            continue
        yield key, str(user_home / value[2:]) if setting.path and value.startswith("~/") else value


def _built(values: Mapping[str, Any]) -> Config:
    data: dict[str, Any] = {}
    for key, value in values.items():
        setting = settings()[key]
        (data.setdefault(setting.section, {}) if setting.section else data)[setting.name] = value
    return msgspec.convert(data, Config)


def _refuse(loaded: Loaded, rules: Iterable[Broken]) -> None:
    def told(key: str) -> str:
        return _told(settings()[key], settings()[key].of(loaded.config), loaded.source(key))

    problems = [f"{sentence}: {', '.join(map(told, keys))}" for sentence, keys in rules]
    if problems:
        raise ConfigError("\n".join(problems))


def _told(setting: Setting, value: object, source: str) -> str:
    return f"{setting.key} = {setting.shown(value)} ({source})"
