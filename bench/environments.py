"""Virtual environments of the peers: their packages first, then those of this one, so that all run the same engine."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import narsil_stream

MARK = "narsil-packages.txt"
INSTALL_S = 1800.0


class NotInstalled(RuntimeError):
    """A peer that cannot be installed here, and why."""


def python(folder: Path, packages: tuple[str, ...], say: Callable[[str], None]) -> Path:
    """The interpreter of an environment with these packages, made in `folder` if need be. Raises NotInstalled."""
    mark, interpreter = folder / MARK, folder / "bin" / "python"
    wanted = "\n".join((sys.version, *packages))
    if not (mark.exists() and mark.read_text() == wanted):
        say(f"installing {' '.join(packages)} into {folder}")
        try:
            venv.create(folder, clear=True, with_pip=True, symlinks=True)
            command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, env=alone)
        except (OSError, subprocess.SubprocessError) as error:
            raise NotInstalled(str(error)) from error
        if done.returncode:
            raise NotInstalled((done.stderr.strip() or "pip failed").splitlines()[-1])
        _see_ours(folder)
        mark.write_text(wanted)
    return interpreter


def _see_ours(folder: Path) -> None:
    """What a peer does not bring itself comes from here: torch, msgspec, this package."""
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    root = Path(narsil_stream.__file__).resolve().parent.parent
    ours = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    behind = dict.fromkeys([*ours, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(root)])
    (site / "narsil.pth").write_text("\n".join(behind) + "\n")


def versions(interpreter: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """What is installed of the pinned ones among these requirements, by name."""
    names = [package.partition("==")[0].partition("[")[0] for package in packages if "==" in package]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(interpreter), "-c", code, *names], capture_output=True, text=True, timeout=60)
    return dict(zip(names, done.stdout.split(), strict=False))
