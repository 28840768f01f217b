"""Configuration: where values come from, what is refused and how it is told."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from narsil_stream.core.config import BatchConfig, Config, ConfigError, HttpConfig, child_environ, load, to_environ
from narsil_stream.core.config.settings import Setting, settings


def problem(
    environ: dict[str, str] | None = None, flags: dict[str, object] | None = None, file: Path | None = None
) -> str:
    """The message with which these sources are refused."""
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {}, flags or {})
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path):
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "narsil.toml"
        path.write_text(text)
        return path

    return write


def test_a_flag_wins_over_a_variable_over_a_file_over_the_default(toml):
    """Whoever starts a process by hand must be able to override what the deployment set."""
    file = toml("[http]\nport = 1001\n[batch]\nmax_rows = 1002\nlinger_us = 1003\n")
    environ = {"NARSIL_HTTP_PORT": "2001", "NARSIL_BATCH_MAX_ROWS": "2002"}
    loaded = load(file, environ, {"http.port": 3001})
    assert (loaded.config.http.port, loaded.config.batch.max_rows) == (3001, 2002)
    assert (loaded.config.batch.linger_us, loaded.config.grpc.port) == (1003, 8001)
    assert loaded.source("http.port") == "flag --http-port"
    assert loaded.source("batch.max_rows") == "variable NARSIL_BATCH_MAX_ROWS"
    assert loaded.source("batch.linger_us") == f"file {file}"
    assert loaded.source("grpc.port") == "default"


def test_the_file_may_be_named_by_a_variable(toml):
    """A container image sets NARSIL_CONFIG once; `--config` still wins."""
    named = {"NARSIL_CONFIG": str(toml("[http]\nport = 1001\n"))}
    assert load(None, named, {}).config.http.port == 1001


def test_a_flag_that_was_not_given_leaves_the_value_alone():
    """Click passes None for absent flags: they must not hide variables."""
    assert load(None, {"NARSIL_MODE": "inline"}, {"mode": None}).config.mode == "inline"


def test_an_empty_variable_counts_as_not_set():
    """Compose files write `NARSIL_HTTP_PORT=${PORT:-}`: that is nobody's wish for a port named ""."""
    assert load(None, {"NARSIL_HTTP_PORT": ""}, {}).config.http.port == 8000


def test_the_data_folder_follows_the_xdg_rules():
    """Data must land where the user's other data is, and a relative XDG_DATA_HOME is to be ignored."""
    assert load(None, {"XDG_DATA_HOME": "/data"}, {}).config.data_dir == "/data/narsil-stream"
    relative = {"XDG_DATA_HOME": "data", "HOME": "/home/a"}
    assert load(None, relative, {}).config.data_dir == "/home/a/.local/share/narsil-stream"


def test_a_tilde_in_a_path_is_the_home_folder():
    """Only a shell expands it: in a file or a unit's environment it would make a folder named "~"."""
    environ = {"NARSIL_MODEL": "~/models/dlrm", "HOME": "/home/a"}
    assert load(None, environ, {}).config.model == "/home/a/models/dlrm"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"NARSIL_HTTP_PORT": "80a"}, 'http.port = "80a" (variable NARSIL_HTTP_PORT): expected a whole number'),
        ({"NARSIL_HTTP_PORT": "70000"}, "expected a whole number from 0 to 65535"),
        ({"NARSIL_MODE": "bach"}, 'mode = "bach" (variable NARSIL_MODE): expected one of batch, worker, inline'),
        ({"NARSIL_TIMING_FAILOVER_FACTOR": "nan"}, "expected a number from 1.0 to 100.0"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_its_source_and_what_was_expected(environ: dict[str, str], told: str):
    """Without all of them the reader has to guess which of four places to correct."""
    assert told in problem(environ)


def test_a_wrong_value_of_a_flag_or_a_file_names_that_flag_or_file(toml):
    """The same message, whatever the source."""
    file = toml('[http]\nport = "8000"\n')
    assert f'http.port = "8000" (file {file}): expected a whole number' in problem(file=file)
    assert "(flag --batch-max-rows): expected a whole number from 1 to" in problem(flags={"batch.max_rows": "0"})


def test_a_duration_may_carry_its_unit_in_a_flag_or_a_variable():
    """`--slo-p99 20ms` is what people write; another unit is refused instead of being taken for milliseconds."""
    assert load(None, {}, {"batch.slo_p99_ms": "20ms"}).config.batch.slo_p99_ms == 20
    assert load(None, {"NARSIL_BATCH_SLO_P99_MS": "2.5 ms"}, {}).config.batch.slo_p99_ms == 2.5
    assert settings()["batch.slo_p99_ms"].flag == "--slo-p99"
    with pytest.raises(ConfigError, match=r"--slo-p99.*expected a number from 0 to 60000"):
        load(None, {}, {"batch.slo_p99_ms": "20us"})


def test_every_problem_is_told_at_once():
    """One restart for each typo is a waste of a deployment."""
    assert len(problem({"NARSIL_MODE": "x", "NARSIL_HTTP_PORT": "x", "NARSIL_NO": "x"}).splitlines()) == 3


def test_an_unknown_setting_is_refused_with_the_nearest_known_one(toml):
    """A typo that is accepted and ignored shows only under load."""
    assert "NARSIL_HTP_PORT (environment): did you mean NARSIL_HTTP_PORT?" in problem({"NARSIL_HTP_PORT": "1"})
    told = problem(file=toml("model_dir = 'x'\n[batsh]\n[http]\nprot = 1\n"))
    assert "unknown setting http.prot" in told and "did you mean http.port?" in told
    assert "unknown setting batsh" in told and "did you mean batch?" in told


def test_a_setting_in_the_wrong_section_is_told_where_it_belongs(toml):
    """TOML puts whatever follows a table into that table: an easy slip."""
    assert "did you mean batch.linger_us?" in problem(file=toml("linger_us = 5\n"))
    assert "http (file" in problem(file=toml("http = 8000\n"))


def test_a_file_that_cannot_be_read_is_told_as_such(toml, tmp_path: Path):
    """A missing or broken file must not end in a traceback, and never be passed over."""
    assert "No such file" in problem(file=tmp_path / "absent.toml")
    assert "No such file" in problem({"NARSIL_CONFIG": str(tmp_path / "absent.toml")})
    told = problem(file=toml("[http\n"))
    assert "not valid TOML" in told and "line 1" in told


KUBERNETES = {
    "NARSIL_SERVICE_HOST": "10.0.0.1",
    "NARSIL_SERVICE_PORT": "8000",
    "NARSIL_SERVICE_PORT_HTTP": "8000",
    "NARSIL_PORT": "tcp://10.0.0.1:8000",
    "NARSIL_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "NARSIL_PORT_8000_TCP_PROTO": "tcp",
    "NARSIL_PORT_8000_TCP_PORT": "8000",
    "NARSIL_PORT_8000_TCP_ADDR": "10.0.0.1",
    "NARSIL_HTTP_SERVICE_HOST": "10.0.0.1",
    "NARSIL_BATCHER_PORT": "tcp://10.0.0.1:9000",
}


def test_variables_that_kubernetes_sets_for_services_are_passed_over():
    """A Service named narsil would otherwise keep every pod of its namespace from starting."""
    assert load(None, KUBERNETES, {}).sources == {}


def test_a_service_address_in_place_of_a_port_is_explained():
    """A Service named narsil-http sets NARSIL_HTTP_PORT to an address: the cure is not obvious."""
    told = problem({"NARSIL_HTTP_PORT": "tcp://10.0.0.1:8000"})
    assert "enableServiceLinks: false" in told and '"narsil-http"' in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"timing.lease_ms": 200}, "at least four heartbeats long"),
        ({"batch.queue_rows": 100}, "at least one full batch"),
        ({"batch.max_budget_us": 1000}, "default budget"),
        ({"batch.linger_us": 500_000, "batch.default_budget_us": 500_000}, "a linger must be shorter"),
        ({"http.port": 8002}, "a port of its own"),
        ({"http.port": 0, "http.processes": 2}, "a port that is named"),
        ({"mode": "inline", "batch.batchers": 2}, "inline runs one"),
        ({"nats.token": "a", "nats.creds_file": "b"}, "one way only"),
        ({"nats.user": "a"}, "a user needs a password"),
        ({"nats.tls_cert": "a"}, "needs its private key"),
        ({"nats.tls_ca": "a", "nats.creds_file": "a"}, "name another broker"),
        ({"nats.url": "http://broker"}, "a broker's address"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: dict[str, object], told: str):
    """Each alone is fine, together they fail hours later: each sentence names all that it is about."""
    message = problem(flags=flags)
    assert told in message
    assert all(f"{key} = " in message for key in flags)


def test_ports_are_free_to_coincide_where_only_one_is_opened():
    """With a broker elsewhere our own broker's port is not taken."""
    load(None, {}, {"http.port": 4222, "nats.url": "nats://elsewhere:4222"})
    load(None, {}, {"http.port": 0, "metrics.port": 0})


def test_secrets_are_not_told():
    """Messages and reprs end in logs."""
    flags = {"nats.user": "u", "nats.password": "hidden", "nats.token": "hidden", "nats.url": "x://u:hidden@h"}
    assert "hidden" not in problem(flags=flags)
    assert "hidden" not in problem({"NARSIL_NATS_PASWORD": "hidden"})
    for url in ("nats://a:hidden@h,nats://b:hidden@h", "hidden@h", "x://hidden://hidden,hidden@h"):
        assert "hidden" not in settings()["nats.url"].shown(url)
    good = load(None, {}, {"nats.url": "nats://u:hidden@h"})
    assert "hidden" not in repr(good)


def test_children_get_exactly_the_parents_configuration(toml):
    """A supervisor's child must not fall back to a file or variable that a flag had overridden."""
    environ = {"NARSIL_CONFIG": str(toml("[http]\nport = 1001\n")), "NARSIL_MODE": "worker", "HOME": "/home/a"}
    flags = {"http.port": 8000, "timing.failover_factor": 2.5, "nats.user": "u", "nats.password": "p"}
    parent = load(None, environ, flags).config
    child = child_environ(parent, environ | {"PATH": "/bin"})
    assert child["PATH"] == "/bin"
    assert "NARSIL_CONFIG" not in child
    assert load(None, child, {}).config == parent


def test_only_what_differs_from_the_defaults_is_handed_down():
    """A child's environment stays readable."""
    assert to_environ(Config()) == {}
    changed = Config(http=HttpConfig(port=9000), batch=BatchConfig(max_rows=8))
    assert to_environ(changed) == {"NARSIL_HTTP_PORT": "9000", "NARSIL_BATCH_MAX_ROWS": "8"}


@pytest.mark.parametrize("setting", settings().values(), ids=lambda setting: setting.key)
def test_every_setting_is_described_and_its_default_is_valid(setting: Setting):
    """Constructors check nothing, so a default outside its own range would be found by nobody."""
    assert setting.description.endswith(".")
    assert msgspec.convert(setting.default, setting.type) == setting.default


def test_no_two_settings_share_a_flag_or_a_variable():
    """`a_b.c` and `a.b_c` would be one variable."""
    for names in ([s.flag for s in settings().values()], [s.variable for s in settings().values()]):
        assert len(set(names)) == len(names)


def test_the_variables_of_the_four_ports_keep_their_names():
    """Users' deployments are built on them."""
    known = {setting.variable for setting in settings().values()}
    assert {"NARSIL_HTTP_PORT", "NARSIL_GRPC_PORT", "NARSIL_METRICS_PORT", "NARSIL_NATS_PORT"} <= known


def test_the_configuration_is_imported_without_numerics():
    """Every `narsil` command pays for what this module imports."""
    code = "import sys, narsil_stream.core.config; sys.exit(bool({'numpy', 'torch', 'nats'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
