"""The house rules that no single module can keep: links, import directions, the commands that documents promise."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import narsil_stream
from narsil_stream.cli.group import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDERS = ("schemas", "kernels", "actors", "gateways", "bench")
BIN = Path(sys.executable).parent
DOCUMENTS = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))))

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run(*command: str | Path, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


def targets() -> set[str]:
    """What `make` offers, by its own list of phony targets."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_is_linked_into_the_package(folder: str):
    """A checkout that turned links into files or copies would import stale code, or none."""
    link = ROOT / "narsil_stream" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", [*FOLDERS, "pickle"])
def test_imports_that_would_make_a_second_module_are_banned(name: str):
    """`schemas.errors.Refused` and `narsil_stream.schemas.errors.Refused` are two classes: no `except` catches both."""
    pytest.importorskip("ruff")
    code = f"import {name}\n\n{name}.x()\n"
    done = run(sys.executable, "-m", "ruff", "check", "--stdin-filename", "actors/new.py", "-", stdin=code)
    assert "TID251" in done.stdout


def test_imports_point_one_way():
    """Adding compute touches only kernels/, adding a transport only gateways/: that ends with the first import back."""
    pytest.importorskip("importlinter")
    done = run(BIN / "lint-imports", "--no-logo")
    assert done.returncode == 0, done.stdout
    assert "Imports point one way KEPT" in done.stdout
    assert "Gateways know nothing of compute KEPT" in done.stdout


def test_the_version_is_one():
    """The wheel, `narsil --version` and the metadata endpoint would tell different stories."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == narsil_stream.__version__


def test_the_check_of_every_change_can_be_run():
    """A lost execute bit turns the whole check off."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "make lint" in text and "make test" in text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_a_document_names_exists(document: str):
    """The first thing that a new user types is copied from there."""
    text = (ROOT / document).read_text()
    code = "\n".join([*re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE), *re.findall(r"`[^`\n]+`", text)])
    named = re.compile(r"(?:^|[`$&|;] *)(narsil|make) ([a-z-]+)\b", re.MULTILINE)
    known = {"make": targets(), "narsil": {entry.name for entry in COMMANDS}}
    assert [f"{tool} {name}" for tool, name in named.findall(code) if name not in known[tool]] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_a_document_names_exists(document: str):
    """A promise with a test that is gone is a promise without one."""
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / document).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@needs_make
def test_make_alone_lists_every_target():
    """Targets that nobody can find are written a second time."""
    listed = set(re.findall(r"^  make ([a-z]+) ", run("make").stdout, re.MULTILINE))
    assert listed == targets()


@needs_make
def test_an_interpreter_that_is_too_old_is_told_before_anything_is_installed(tmp_path: Path):
    """Otherwise the first sign is a syntax error from some dependency, after minutes."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    done = run("make", "serve", "PYTHON=false", cwd=tmp_path)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv-serve").exists()
