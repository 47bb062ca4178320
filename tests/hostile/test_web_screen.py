"""The server of screens and those who should see nothing: wrong, foreign, greedy, and slow ones."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from drivebay.web.screen import CONNECTIONS_MOST, FRAME_BYTES_MOST, TABS_MOST
from tests.unit.web_serving import Serving, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("web")) as made:
        yield made


@pytest.fixture(autouse=True)
def nobody_looked(served: Serving) -> Iterator[None]:
    """Whatever was refused has opened no screen; and who may look, still can."""
    yield
    assert served.qemus.empty()
    with served.look(served.secret()) as tab, served.qemu() as qemu:
        qemu.sendall(b"RFB")
        assert tab.recv(20) == b"RFB"


def refused(served: Serving, secret: str, **changed: object) -> int:
    with pytest.raises(InvalidStatus) as error, served.look(secret, **changed):  # type: ignore[arg-type]
        pass
    return error.value.response.status_code


# ---- who may not look ---------------------------------------------------------------------------


def test_a_tab_without_a_good_secret(served: Serving) -> None:
    secret, token = served.secret(), served.door.tokens.issue("web")
    for wrong in ("", "x", secret[:-1], secret + "x", token, "x" * 5000):
        assert refused(served, wrong) == 403
    assert refused(served, secret, subprotocols=["binary"]) == 403
    assert refused(served, secret, subprotocols=[f"drivebay.{secret}"]) == 403
    assert refused(served, secret, subprotocols=None) == 403
    assert refused(served, secret, name="db") == 403


def test_a_page_of_another_origin(served: Serving) -> None:
    secret = served.secret()
    for origin in ("http://evil.example", f"http://localhost:{served.port}", "null", None):
        assert refused(served, secret, origin=origin) == 403
    token = served.door.tokens.issue("web")
    for origin in ("http://evil.example", "null", ""):
        answer = served.ask(
            "POST", "/screen/web/session", json.dumps({"token": token}).encode(), Origin=origin
        )
        assert answer.status == 403
    assert served.session(token=token).status == 200, "a foreign page does not use it up"


def test_a_name_that_was_bent_to_this_host(served: Serving) -> None:
    evil = f"evil.example:{served.port}"
    for path in ("/screen/web", "/static/screen.js", "/novnc/core/rfb.js"):
        assert served.ask("GET", path, Host=evil, Origin="").status == 403
    token = json.dumps({"token": served.door.tokens.issue("web")}).encode()
    answer = served.ask("POST", "/screen/web/session", token, Host=evil, Origin=f"http://{evil}")
    assert answer.status == 403


def test_a_websocket_of_a_bent_name(served: Serving) -> None:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    for host, origin in (
        ("evil.example", "http://evil.example"),
        (f"{served.host}\r\nHost: evil.example", f"http://{served.host}"),
    ):
        with socket.create_connection(("127.0.0.1", served.port), 20) as raw:
            raw.sendall(
                (f"GET /screen/web/socket HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n"
                 f"Connection: Upgrade\r\nUpgrade: websocket\r\n{key}"
                 f"Sec-WebSocket-Protocol: binary, drivebay.{served.secret()}\r\n\r\n").encode()
            )  # fmt: skip
            assert raw.recv(99).split()[1] in (b"403", b"400")


# ---- what is no request of ours -----------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/novnc/../secret.js",
        "/novnc/core/../../secret.js",
        "/novnc/core/%2e%2e/%2e%2e/secret.js",
        "/novnc/%2e%2e%2fsecret.js",
        "/novnc//etc/passwd",
        "/novnc/core/rfb.js%00",
        "/novnc/core/./rfb.js",
        "/static/../screen.py",
        "/static/%2e%2e/screen.py",
        "/static/..%2fscreen.py",
        "/static/%252e%252e/screen.py",
        "//static/screen.js",
        "/screen/..%2f..",
        "/screen/%2e%2e",
        "/screen/" + "x" * 41,
        "/screen/a%0ab",
        "/screen/",
    ],
)
def test_a_path_that_leads_elsewhere(served: Serving, path: str) -> None:
    answer = served.ask("GET", path)
    assert answer.status == 404
    assert b"secret" not in answer.body


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "POST"])
def test_a_method_that_nothing_has(served: Serving, method: str) -> None:
    assert served.ask(method, "/screen/web").status == 405


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"token"',
        b'{"token": 1}',
        b'{"token": null}',
        b'{"secret": {"a": 1}}',
        b"\xff\xfe",
        b"[" * 1000,
        b'{"token": "' + b"x" * 2000 + b'"}',
        bytes(100_000),
    ],
)
def test_a_body_that_is_no_small_object_of_texts(served: Serving, body: bytes) -> None:
    assert served.ask("POST", "/screen/web/session", body).status == 400


def test_surrogates_and_other_letters_are_no_secret(served: Serving) -> None:
    for said in (b'{"token": "\\udcff"}', b'{"secret": "\\u0000"}', b"{}", b'{"other": "x"}'):
        assert served.ask("POST", "/screen/web/session", said).status == 403


def test_headers_without_an_end(served: Serving) -> None:
    """They are refused long before all are there."""
    endless = b"".join(b"X-%d: " % number + b"x" * 1000 + b"\r\n" for number in range(100))
    with socket.create_connection(("127.0.0.1", served.port), 20) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n" + endless)
        assert raw.recv(99).split()[1] == b"400"


# ---- tabs that misbehave ------------------------------------------------------------------------


def ended(served: Serving, message: bytes | str) -> int:
    """Send it; the code that the tab is closed with. QEMU's end is closed, too."""
    with served.look(served.secret()) as tab, served.qemu() as qemu:
        tab.send(message)
        with pytest.raises(ConnectionClosed) as error:
            tab.recv(20)
        while qemu.recv(65536):
            pass
    assert error.value.rcvd is not None
    return error.value.rcvd.code


def test_a_text_is_no_rfb(served: Serving) -> None:
    assert ended(served, "RFB 003.008\n") == 1003


def test_a_frame_that_is_too_large(served: Serving) -> None:
    assert ended(served, bytes(FRAME_BYTES_MOST + 1)) == 1009


def test_a_tab_that_is_cut_off_in_the_middle_of_a_frame(served: Serving) -> None:
    with served.look(served.secret()) as tab, served.qemu() as qemu:
        tab.socket.sendall(b"\x82\xfe\x10\x00mask")  # 4096 bytes are announced
        tab.socket.shutdown(socket.SHUT_RDWR)
        assert qemu.recv(1) == b""


def test_a_frame_without_a_mask(served: Serving) -> None:
    with served.look(served.secret()) as tab, served.qemu() as qemu:
        tab.socket.sendall(b"\x82\x01x")
        with pytest.raises(ConnectionClosed):
            tab.recv(20)
        assert qemu.recv(1) == b""


def test_a_tab_that_reads_nothing_holds_up_its_own_screen_only(served: Serving) -> None:
    """QEMU is not read any more: nothing piles up in between."""
    with served.look(served.secret(), max_queue=1) as tab, served.qemu() as qemu:
        qemu.setblocking(False)
        sent, silence = 0, 0
        while silence < 50 and sent < 256 << 20:
            try:
                sent, silence = sent + qemu.send(bytes(1 << 20)), 0
            except BlockingIOError:
                silence += 1
                time.sleep(0.01)
        assert silence == 50, f"{sent >> 20} MiB were taken"
        with served.look(served.secret()) as other, served.qemu() as its:
            its.sendall(b"goes on")
            assert other.recv(20) == b"goes on"
        tab.socket.shutdown(socket.SHUT_RDWR)


def test_more_tabs_than_there_may_be(served: Serving) -> None:
    secret = served.secret()
    with ExitStack() as tabs:
        for _ in range(TABS_MOST):
            tabs.enter_context(served.look(secret))
        qemus = [served.qemu() for _ in range(TABS_MOST)]
        assert refused(served, secret) == 503
    for qemu in qemus:
        assert qemu.recv(1) == b""
        qemu.close()


def test_more_connections_than_there_may_be(served: Serving) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port), 20)
            for _ in range(CONNECTIONS_MOST)]  # fmt: skip
    try:
        assert served.ask("GET", "/screen/web").status == 503
    finally:
        for each in idle:
            each.close()
    while served.ask("GET", "/screen/web").status == 503:
        pass
