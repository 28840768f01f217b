"""The page at /docs as people see it: in a browser, if this machine has one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core import tokens
from narsil_stream.core.config import Config
from narsil_stream.core.config.access import AccessConfig
from narsil_stream.gateways.http_documents import PAGE, POLICY
from narsil_stream.schemas import openapi
from tests.asking import ask_http
from tests.gateways.browser import NAMES, Browser, found
from tests.support import NatsServer, System

SHAPES = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
TRY = "document.querySelector('#ModelInfer .try')"


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    if (path := found()) is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is on the path")
    with Browser(path) as opened:
        yield opened


@pytest.fixture
def browser(one_browser: Browser) -> Browser:
    """With a page of the test's own."""
    one_browser.fresh()
    return one_browser


def open_page(browser: Browser, port: int, anchor: str = "") -> None:
    browser.open(f"http://127.0.0.1:{port}/docs{anchor}")
    browser.wait("document.querySelectorAll('.op').length", "the page has read the document")


def send(browser: Browser, media_type: str) -> str:
    """Presses the button; the status of the answer."""
    choose = (
        f"Object.assign({TRY}.querySelector('select'), {{value: '{media_type}'}}).dispatchEvent(new Event('change'))"
    )
    browser.look(
        f"{choose}, {TRY}.querySelector('[role=status]').replaceChildren(), {TRY}.querySelector('.main').click()"
    )
    browser.wait(f"{TRY}.querySelector('[role=status] .status')", "an answer")
    status: str = browser.look(f"{TRY}.querySelector('[role=status] .status').textContent")
    return status


def test_the_page_holds_all_that_it_needs() -> None:
    """Racks without a way out are where such a page is opened."""
    assert b"http://" not in PAGE and b"https://" not in PAGE and b"@import" not in PAGE
    assert "'unsafe-" not in POLICY and "default-src 'none'" in POLICY


def test_the_page_comes_with_its_policy(demo_system: System) -> None:
    """What a document or an answer holds must not become a program in somebody's browser."""
    answer = ask_http(demo_system.http_port, "GET", "/docs")
    assert (answer.status, answer.body, answer.headers["content-security-policy"]) == (200, PAGE, POLICY)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_shows_every_operation_and_asks_nobody_else(
    demo_system: System, browser: Browser, shape: str, scheme: str
) -> None:
    """On a desktop and on a phone, in light and in dark, with nothing that sticks out at the side."""
    width, height, phone = SHAPES[shape]
    browser.dress(width, height, scheme, phone)
    open_page(browser, demo_system.http_port, "#ModelInfer")
    operations = sum(map(len, openapi.document()["paths"].values()))
    assert browser.look("document.querySelectorAll('.op').length") == operations
    browser.look("document.querySelectorAll('details').forEach(one => one.open = true)")
    browser.wait(f"document.querySelectorAll('.try').length == {operations}", "every operation is open")
    assert browser.look("document.documentElement.scrollWidth <= innerWidth")
    ground = browser.look("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    browser.wait("document.getElementById('state').textContent === 'ready'", "the server's state")
    ours = f"http://127.0.0.1:{demo_system.http_port}/"
    assert [url for url in browser.fetched if not url.startswith((ours, "about:", "data:"))] == []
    assert browser.complaints == []


def test_the_button_sends_each_example_and_shows_the_score(demo_system: System, browser: Browser) -> None:
    """Trying is how people find out whether they have understood."""
    open_page(browser, demo_system.http_port, "#ModelInfer")
    browser.wait(TRY, "the operation that the address names is open")
    score = str(openapi.SCORE)[:6]
    for media_type in (openapi.JSON, openapi.BINARY, openapi.MSGPACK):
        assert send(browser, media_type) == "200"
        shown = browser.look(f"{TRY}.querySelector('[role=status]').textContent")
        assert (score in shown) == (media_type == openapi.JSON)
        assert "curl -s" in shown
    assert browser.complaints == []


def test_a_wrong_request_shows_what_the_server_says_of_it(demo_system: System, browser: Browser) -> None:
    """The message is written for the caller; a page that only said 400 would hide it."""
    open_page(browser, demo_system.http_port, "#ModelInfer")
    browser.wait(TRY, "the operation that the address names is open")
    browser.look(f"{TRY}.querySelector('textarea').value = '{{\"inputs\": []}}'")
    assert send(browser, openapi.JSON) == "400"
    assert "INVALID_ARGUMENT" in browser.look(f"{TRY}.querySelector('[role=status]').textContent")


def test_another_model_gets_a_request_of_its_own_shape(shared_system: System, browser: Browser) -> None:
    """The examples fit the demo model; most people have come for theirs."""
    open_page(browser, shared_system.http_port, "#ModelInfer")
    browser.wait(TRY, "the operation that the address names is open")
    assert browser.look(f"{TRY}.querySelector('input').value") == "ctr"
    browser.look(f"{TRY}.querySelector('textarea').value = ''")
    browser.look(f"{TRY}.querySelector('button:not(.main)').click()")
    browser.wait(f"{TRY}.querySelector('textarea').value", "a request that fits")
    assert send(browser, openapi.JSON) == "200"


def test_finding_leaves_what_matches(demo_system: System, browser: Browser) -> None:
    """There are more operations than a screen holds."""
    open_page(browser, demo_system.http_port)
    browser.look(
        "Object.assign(document.getElementById('filter'), {value: 'unload'}).dispatchEvent(new Event('input'))"
    )
    left = "[...document.querySelectorAll('.op:not([hidden])')].map(one => one.id).join()"
    assert browser.look(left) == "RepositoryModelUnload"


def test_the_token_that_was_typed_is_sent_and_nowhere_kept(
    demo_model: Path, browser: Browser, tmp_path: Path, nats_server: NatsServer
) -> None:
    """Without it the page could not be used where it is needed most; in storage it would outlive the visit."""
    token = tokens.make()
    (tmp_path / "tokens").write_text(tokens.line(token, frozenset({"infer"})) + "\n")
    (tmp_path / "tokens").chmod(0o600)
    config = replace(Config(), access=AccessConfig(tokens_file=str(tmp_path / "tokens")))
    with System(nats_server.url, demo_model, config=config, gateways=1) as system:
        open_page(browser, system.http_port, "#ModelInfer")
        browser.wait(TRY, "the operation that the address names is open")
        assert send(browser, openapi.JSON) == "401"
        browser.look(f"document.getElementById('token').value = '{token}'")
        assert send(browser, openapi.JSON) == "200"
        assert token not in browser.look(f"{TRY}.textContent")
        assert browser.look("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
