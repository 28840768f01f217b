"""The top command and `narsil config`."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from narsil_stream import __version__
from narsil_stream.cli import cli
from narsil_stream.cli.options import config_options
from narsil_stream.core.config import Config, load
from narsil_stream.core.config.settings import settings

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer's shell sets is not part of these tests."""
    for setting in settings().values():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("NARSIL_CONFIG", raising=False)


def narsil(*args: str, **environ: str) -> Result:
    return CliRunner().invoke(cli, list(args), env=environ)


def test_help_lists_every_command_and_imports_none():
    """Help is what people ask for first: it must not wait for NumPy or a broker's client."""
    code = (
        "import sys; from click.testing import CliRunner; from narsil_stream.cli import cli;"
        "out = CliRunner().invoke(cli, ['--help']).output;"
        "assert all(name in out for name in cli.commands), out;"
        "assert not {'numpy', 'nats', 'granian', 'narsil_stream.cli.config'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_told_with_the_nearest_one():
    """Lazy commands must not cost the suggestion."""
    result = narsil("confg")
    assert result.exit_code == 2
    assert "config" in result.output


def test_the_version_is_told_in_one_line():
    """Bug reports begin with it."""
    assert narsil("--version").output == f"narsil {__version__}\n"


def test_the_printed_configuration_can_be_kept_as_a_file(tmp_path: Path):
    """`narsil config > narsil.toml` freezes what runs now."""
    printed = narsil("config", "--http-port", "9000", "--model", 'a "b"\\c').output
    file = tmp_path / "narsil.toml"
    file.write_text(printed)
    again = load(file, {}, {}).config
    assert (again.http.port, again.model) == (9000, 'a "b"\\c')
    assert set(tomllib.loads(printed)) == set(Config.__struct_fields__)


def test_what_is_not_a_default_says_where_it_came_from(tmp_path: Path):
    """Four sources, and the question is always which one won."""
    file = tmp_path / "narsil.toml"
    file.write_text("[batch]\nmax_rows = 8\n")
    lines = narsil("config", "--http-port=9000", f"--config={file}", NARSIL_MODE="worker").output.splitlines()
    assert "port = 9000  # flag --http-port" in lines
    assert 'mode = "worker"  # variable NARSIL_MODE' in lines
    assert f"max_rows = 8  # file {file}" in lines
    assert "port = 8001" in lines


def test_json_gives_values_and_sources():
    """Scripts read this one."""
    shown = json.loads(narsil("config", "--json", NARSIL_HTTP_PORT="9000").output)
    assert shown["config"]["http"]["port"] == 9000
    assert shown["sources"] == {"http.port": "variable NARSIL_HTTP_PORT"}


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_secrets_are_not_printed(form: tuple[str, ...]):
    """People paste this output into issues."""
    secret = {"NARSIL_NATS_USER": "u", "NARSIL_NATS_PASSWORD": "hidden", "NARSIL_NATS_URL": "nats://u:hidden@host"}
    output = narsil("config", *form, **secret).output
    assert "hidden" not in output
    assert "***" in output and "host" in output


def test_the_documented_settings_are_the_real_ones():
    """Documentation that drifts is worse than none: `narsil config --docs > docs/settings.md` corrects it."""
    assert DOCS.read_text() == narsil("config", "--docs").output


def test_a_refused_configuration_ends_with_status_2_and_no_traceback():
    """Supervisors tell a wrong configuration, which no restart mends, from a crash."""
    result = narsil("config", "--http-port", "70000")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith('narsil: http.port = "70000" (flag --http-port): expected a whole number')
    assert narsil("config", NARSIL_HTP_PORT="1").exit_code == 2


def test_help_shows_each_flag_with_its_variable_and_default():
    """The help text is the first documentation that people read."""
    text = " ".join(narsil("config", "--help", COLUMNS="400").output.split())
    assert "NARSIL_BATCH_LINGER_US" in text and "Default: 4096." in text
    assert all(setting.flag in text for setting in settings().values())


def test_a_command_has_flags_only_for_what_it_names():
    """A flag that is accepted and ignored misleads."""

    def flags(*names: str) -> set[str]:
        command = config_options(*names)(lambda loaded: None)
        return {opt for option in command.__click_params__ for opt in option.opts}

    logs = {"--log-level", "--log-format"}
    assert flags("metrics", "mode") == {"--config", "--mode", "--metrics-host", "--metrics-port"} | logs
    assert flags("nats.url") == {"--config", "--nats-url"} | logs
    assert {setting.flag for setting in settings().values()} < flags()
    with pytest.raises(ValueError, match="https"):
        config_options("https")


def test_python_m_narsil_stream_is_the_command():
    """A supervisor starts its children with the interpreter that it runs on, whatever PATH says."""
    command = [sys.executable, "-m", "narsil_stream", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith("narsil ")
