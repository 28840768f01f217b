"""The configuration for people and for other programs: TOML, JSON and the documentation's tables."""

from collections.abc import Iterator

import msgspec

from narsil_stream.core.config.settings import Setting, sections, settings, toml_scalar
from narsil_stream.core.config.sources import DEFAULT, Loaded

PRECEDENCE = """\
A flag wins over a variable, a variable over the TOML file (`--config FILE` or `NARSIL_CONFIG`), the file over the
default. An empty variable counts as not set. What is unknown or out of range is refused at start, with the nearest
known name. `narsil config` shows the effective values and where each came from.

What is marked *live* can be changed while the system runs: `narsil tune KEY=VALUE` (docs/scheduling.md).
"""


def as_toml(loaded: Loaded) -> str:
    """The effective configuration, to read or to keep as a file. Values that hold secrets are only comments."""
    lines = ["# Effective configuration. A value without a comment is a default."]
    for section, group in _by_section():
        if section:
            lines += ["", f"[{section}]"]
        lines += [_toml_line(setting, loaded) for setting in group]
    return "\n".join(lines) + "\n"


def as_json(loaded: Loaded) -> str:
    """`{"config": {...}, "sources": {key: source}}`, without secrets; what has no source is a default."""
    config: dict[str, object] = {}
    for section, group in _by_section():
        values = {setting.name: _public(setting, loaded) for setting in group}
        config |= {section: values} if section else values
    return _pretty({"config": config, "sources": loaded.sources})


def as_docs() -> str:
    """The whole page of the documentation on settings."""
    parts = ["# Settings\n", PRECEDENCE, "Made by `narsil config --docs`; a test compares.\n"]
    for section, group in _by_section():
        title = f"{group[0].panel}: {f'`[{section}]`' if section else 'top level'}"
        rows = [_docs_row(setting) for setting in group]
        head = ["| key | flag | variable | default | meaning |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {title}\n", *head, *rows]) + "\n")
    return "\n".join(parts)


def _by_section() -> Iterator[tuple[str, list[Setting]]]:
    for section in ("", *sections()):
        yield section, [setting for setting in settings().values() if setting.section == section]


def _toml_line(setting: Setting, loaded: Loaded) -> str:
    value, source = setting.of(loaded.config), loaded.source(setting.key)
    shown = setting.shown(value)
    line = f"{setting.name} = {shown}"
    if source != DEFAULT:
        line += f"  # {source}"
    return line if shown == toml_scalar(value) else f"# {line}"


def _public(setting: Setting, loaded: Loaded) -> object:
    value = setting.of(loaded.config)
    shown = setting.shown(value)
    return value if shown == toml_scalar(value) else msgspec.json.decode(shown)


def _docs_row(setting: Setting) -> str:
    names = (setting.key, setting.flag, setting.variable, setting.shown_default or '""')
    meaning = setting.meaning.replace("|", "\\|") + " *live*" * setting.live
    cells = [f"`{name}`" for name in names] + [meaning]
    return f"| {' | '.join(cells)} |"


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
