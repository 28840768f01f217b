"""The schema as a flat table: one `Setting` for each value, with its names in files, flags and variables."""

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, structs

from narsil_stream.core.config.schema import Config

PREFIX = "NARSIL_"
GENERAL = Config.__doc__ or ""


class Setting(Struct, frozen=True):
    """One value of the configuration. `key` is "field" at the top level and "section.field" below it."""

    key: str
    type: Any
    default: Any
    description: str
    extra: dict[str, Any]

    @property
    def section(self) -> str:
        """ "" at the top level."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def flag(self) -> str:
        return str(self.extra.get("flag") or "--" + self.key.replace(".", "-").replace("_", "-"))

    @property
    def unit(self) -> str:
        """What may follow the number in a flag or variable; "": nothing."""
        return str(self.extra.get("unit", ""))

    @property
    def variable(self) -> str:
        return PREFIX + self.key.replace(".", "_").upper()

    @property
    def secret(self) -> bool:
        return bool(self.extra.get("secret"))

    @property
    def path(self) -> bool:
        return bool(self.extra.get("path"))

    @property
    def live(self) -> bool:
        """Whether it may change while an actor runs."""
        return bool(self.extra.get("live"))

    @property
    def shown_default(self) -> str:
        """For people, the same on every machine."""
        default = self.extra.get("default", self.default)
        return default if isinstance(default, str) else toml_scalar(default)

    @property
    def panel(self) -> str:
        """The title under which help and documentation list it."""
        return sections()[self.section].__doc__ or "" if self.section else GENERAL

    @property
    def meaning(self) -> str:
        """The description, with the range of a number."""
        if self.base in (str, bool) or self.choices:
            return self.description
        return f"{self.description} From {self.bound('ge')} to {self.bound('le')}."

    @property
    def base(self) -> Any:
        """The plain type: int, float, bool, str or a Literal."""
        return get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.base) if get_origin(self.base) is Literal else ()

    def bound(self, name: Literal["ge", "le", "min_length"]) -> Any:
        """That constraint of the schema, None where there is none."""
        return next((v for meta in _metas(self.type) if (v := getattr(meta, name)) is not None), None)

    @property
    def expected(self) -> str:
        """What a value must be, to end a sentence with."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.base is str:
            return "text that is not empty" if self.bound("min_length") else "text"
        if self.base is bool:
            return "true or false"
        kind = "a whole number" if self.base is int else "a number"
        return f"{kind} from {self.bound('ge')} to {self.bound('le')}"

    def of(self, config: Config) -> Any:
        """This setting's value in `config`."""
        return getattr(getattr(config, self.section) if self.section else config, self.name)

    def shown(self, value: object) -> str:
        """`value` for people: as TOML spells it, without what is secret."""
        if self.secret and value:
            return '"***"'
        return toml_scalar(without_login(str(value)) if self.key == "nats.url" else value)


def toml_scalar(value: object) -> str:
    """A string, number or truth value in TOML's spelling; a JSON string is a TOML basic string, except for DEL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return str(value)


def without_login(url: str) -> str:
    """An address for people. Rather too much hidden than too little: of several with logins the last host is left."""
    login, at, host = url.rpartition("@")
    scheme, separator, _ = login.partition("://")
    if not at:
        return url
    return f"{scheme}://***@{host}" if separator else f"***@{host}"


def _metas(annotation: Any) -> list[Meta]:
    return [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Meta)]


def _setting(key: str, field: structs.FieldInfo) -> Setting:
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    metas = _metas(field.type)
    description = next((meta.description for meta in metas if meta.description), "")
    extra = next((meta.extra for meta in metas if meta.extra), {})
    return Setting(key=key, type=field.type, default=default, description=description, extra=extra)


@cache
def sections() -> dict[str, type[Struct]]:
    """The sections by name, in the order of the schema."""
    return {f.name: f.type for f in structs.fields(Config) if isinstance(f.type, type) and issubclass(f.type, Struct)}


@cache
def settings() -> dict[str, Setting]:
    """All settings by key, in the order of the schema, the top level first."""
    found = [_setting(f.name, f) for f in structs.fields(Config) if f.name not in sections()]
    for name, section in sections().items():
        found += [_setting(f"{name}.{f.name}", f) for f in structs.fields(section)]
    return {setting.key: setting for setting in found}
