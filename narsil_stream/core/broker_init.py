"""A configuration of nats-server that lets in nkeys alone, each with what its part needs: `narsil broker --init`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import nkeys

from narsil_stream.core.broker import limits, quoted
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.permissions import ROLES, Permissions
from narsil_stream.schemas import subjects

CONFIG = "nats-server.conf"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RESPONSE_TIME = "1h"
"""A model may take its time to load before the executor answers."""
HEAD = """\
# Written by `narsil broker --init`. Users prove who they are with a key, no secret is in this file.
# The meaning of the users: docs/security.md.
"""
TLS = """\
# Between machines, also encrypt: the parts then need nats.tls_ca, and a tls:// address.
# tls { cert_file: "server.pem", key_file: "server.key" }
"""


class User(NamedTuple):
    name: str
    role: str
    nkey: str
    """The public key."""
    seed_file: Path

    @property
    def inbox(self) -> str:
        return subjects.inbox(self.nkey)


def init(folder: Path, config: NatsConfig, users: Mapping[str, str]) -> list[User]:
    """Write nats-server.conf and the seed of each of `users` (name to role) into `folder`, for its owner only.

    Raises FileExistsError rather than write over something, OSError, and ValueError for names and roles.
    """
    for name, role in users.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"user {name!r}: expected a name that matches {NAME.pattern}")
        if role not in ROLES:
            raise ValueError(f"user {name!r}: role {role!r} is none of {', '.join(ROLES)}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder / CONFIG} is there already; choose another folder")
    made = [_user(folder, name, role) for name, role in users.items()]
    _write(folder / CONFIG, _config(config, made))
    return made


def _user(folder: Path, name: str, role: str) -> User:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    path = folder / f"{name}.nk"
    _write(path, f"{seed.decode()}\n")
    return User(name, role, nkeys.from_seed(bytearray(seed)).public_key.decode(), path)


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def _config(config: NatsConfig, users: list[User]) -> str:
    lines = [HEAD, *limits(config), "", TLS, "authorization {", "  users: ["]
    for user in users:
        lines += _entry(user, ROLES[user.role].permissions)
    return "\n".join([*lines, "  ]", "}", ""])


def _entry(user: User, permissions: Permissions) -> list[str]:
    heard = [f"{user.inbox}.>"] if permissions.inbox else []
    lines = [
        f"    # {user.name}" + (f", a {user.role}" if user.role != user.name else ""),
        f"    {{ nkey: {user.nkey}, permissions: {{",
        f"      publish: {_allow(permissions.publish)}",
        f"      subscribe: {_allow([*permissions.subscribe, *heard])}",
    ]
    if permissions.responses:
        lines.append(f'      allow_responses: {{ max: 1, expires: "{RESPONSE_TIME}" }}')
    return [*lines, "    } }"]


def _allow(allowed: tuple[str, ...] | list[str]) -> str:
    return "\n".join(["{ allow: [", *(f"        {quoted(subject)}" for subject in allowed), "      ] }"])
