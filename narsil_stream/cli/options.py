"""Click options made from the configuration's schema."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import rich_click as click

from narsil_stream.core.config import ConfigError, check_doors, load
from narsil_stream.core.config.settings import GENERAL, Setting, sections, settings
from narsil_stream.core.config.sources import CONFIG_VARIABLE

ALWAYS = ("log_level", "log_format")

Command = Callable[..., Any]


class SettingOption(click.RichOption):
    """A flag that shows its variable but leaves reading it to `load`, which knows what came from where."""

    def resolve_envvar_value(self, ctx: click.Context) -> None:
        return None


def config_options(*names: str, doors: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command `--config FILE` and a flag for each setting of `names`; it gets one `Loaded` as first argument.

    `names` are sections ("http") and single settings ("mode", "nats.url"); none at all stands for everything.
    `--log-level` and `--log-format` are always there. Settings without a flag here still come from variables and
    the file. A configuration that cannot be used ends the command with status 2 and the reason on stderr. `doors` are
    the sections whose ports the command opens: those must not let in whoever reaches them.
    """
    chosen = list(_chosen(names))

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, config_file: Path | None, **params: Any) -> Any:
            flags = {setting.key: params.pop(_parameter(setting)) for setting in chosen}
            try:
                loaded = load(config_file, os.environ, flags)
                check_doors(loaded, *doors)
            except ConfigError as error:
                fail(str(error))
            return command(loaded, *args, **params)

        with_flags: Command = run
        for setting in reversed(chosen):
            with_flags = _option(setting)(with_flags)
        return _config_file(with_flags)

    return decorate


def fail(reason: str) -> NoReturn:
    """End the command with status 2: what it was asked cannot be done, `reason` says why."""
    for line in reason.splitlines():
        click.echo(f"narsil: {line}", err=True)
    raise SystemExit(2)


def _chosen(names: tuple[str, ...]) -> Iterator[Setting]:
    unknown = set(names) - set(sections()) - set(settings())
    if unknown:
        raise ValueError(f"neither a section nor a setting: {', '.join(sorted(unknown))}")
    for setting in settings().values():
        if not names or {setting.key, setting.section} & {*names, *ALWAYS}:
            yield setting


def _parameter(setting: Setting) -> str:
    """Its name inside click, which no parameter of a command's own can have."""
    return "setting_" + setting.key.replace(".", "_")


def _config_file(command: Command) -> Command:
    return click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        panel=GENERAL,
        envvar=CONFIG_VARIABLE,
        show_envvar=True,
        cls=SettingOption,
        help="TOML file with settings; flags and variables win over it.",
    )(command)


def _option(setting: Setting) -> Callable[[Command], Command]:
    """Numbers stay text here: `load` converts them, and refuses them in the same words as those of a file."""
    if setting.base is bool:
        return _switch(setting)
    return click.option(
        setting.flag,
        _parameter(setting),
        cls=SettingOption,
        type=click.Choice(setting.choices) if setting.choices else click.STRING,
        metavar=_metavar(setting),
        envvar=setting.variable,
        show_envvar=True,
        panel=setting.panel,
        help=_help(setting),
    )


def _switch(setting: Setting) -> Callable[[Command], Command]:
    """`--x` and `--no-x`: a flag must be able to overrule a variable both ways."""
    return click.option(
        f"{setting.flag}/--no-{setting.flag.removeprefix('--')}",
        _parameter(setting),
        cls=SettingOption,
        default=None,
        envvar=setting.variable,
        show_envvar=True,
        panel=setting.panel,
        help=_help(setting),
    )


def _help(setting: Setting) -> str:
    return f"{setting.meaning} Default: {setting.shown_default}." if setting.shown_default else setting.meaning


def _metavar(setting: Setting) -> str | None:
    if setting.choices:
        return None
    if setting.base is not str:
        return "N"
    return "PATH" if setting.path else "TEXT"
