"""web/screen.py as browsers use it: the page, the way in, the screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from drivebay.web.relay import ENDED
from drivebay.web.screen import NOT_SHOWN, address_of
from tests.unit.web_serving import Serving, serving

SECURE = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("web")) as made:
        yield made


@pytest.fixture(autouse=True)
def on(served: Serving) -> None:
    served.on = True


def test_the_token_is_where_no_browser_sends_it() -> None:
    assert address_of("web", 99, "abc") == "http://127.0.0.1:99/screen/web#token=abc"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/screen/web", "text/html"),
        ("/static/screen.css", "text/css"),
        ("/static/screen.js", "text/javascript"),
        ("/static/words.js", "text/javascript"),
        ("/novnc/core/rfb.js", "text/javascript"),
        ("/novnc/core/util/int.js", "text/javascript"),
        ("/novnc/vendor/pako.js", "text/javascript"),
    ],
)
def test_the_files_of_the_page(served: Serving, path: str, kind: str) -> None:
    answer = served.ask("GET", path, Origin="")
    assert answer.status == 200
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.body


def test_every_answer_has_the_headers_that_keep_others_away(served: Serving) -> None:
    answers = [
        served.ask("GET", "/screen/web"),
        served.ask("GET", "/novnc/core/rfb.js"),
        served.ask("GET", "/nothing"),
        served.ask("PUT", "/screen/web"),
        served.ask("GET", "/screen/web", Host="evil.example"),
        served.session(token="x"),
    ]
    assert [answer.status for answer in answers] == [200, 200, 404, 405, 403, 403]
    for answer in answers:
        assert {name: answer.headers[name] for name in SECURE} == SECURE
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "server" not in answer.headers
    assert f"ws://{served.host};" in answers[0].headers["content-security-policy"]


def test_the_page_is_the_same_for_every_name(served: Serving) -> None:
    assert served.ask("GET", "/screen/web").body == served.ask("GET", "/screen/none").body


def test_a_token_is_exchanged_once_for_a_secret_that_stays_good(served: Serving) -> None:
    token = served.door.tokens.issue("web")
    answer = served.session(token=token)
    secret = answer.json()["secret"]
    assert served.session(token=token).status == 403
    for _ in range(2):
        assert served.session(secret=secret).status == 200
    assert served.session(secret=token).status == 403
    assert served.session("db", secret=secret).status == 403


def test_a_token_of_another_vm_is_used_up_and_opens_nothing(served: Serving) -> None:
    token = served.door.tokens.issue("db")
    assert served.session("web", token=token).status == 403
    assert served.session("db", token=token).status == 403


def test_several_tabs_have_a_screen_each(served: Serving) -> None:
    secret = served.secret()
    with served.look(secret) as first, served.qemu() as one:
        with served.look(secret) as second, served.qemu() as two:
            one.sendall(b"one")
            two.sendall(b"two")
            assert (first.recv(20), second.recv(20)) == (b"one", b"two")
            assert second.subprotocol == "binary"
            second.send(b"\x00\xff")
            assert two.recv(9) == b"\x00\xff"
        assert two.fileno() == -1
        first.send(b"still there")
        assert one.recv(99) == b"still there"


def test_a_tab_that_is_closed_closes_qemus_end(served: Serving) -> None:
    with served.look(served.secret()), served.qemu() as qemu:
        pass
    with served.look(served.secret()) as tab, served.qemu() as qemu:
        tab.close()
        assert qemu.recv(1) == b""


def test_the_end_of_the_vm_is_told(served: Serving) -> None:
    with served.look(served.secret()) as tab:
        served.qemu().close()
        with pytest.raises(ConnectionClosed) as error:
            tab.recv(20)
    assert error.value.rcvd is not None
    assert error.value.rcvd.code == ENDED


def test_a_vm_that_is_off_is_told_with_the_reason(served: Serving) -> None:
    secret = served.secret()
    served.on = False
    with served.look(secret) as tab, pytest.raises(ConnectionClosed) as error:
        tab.recv(20)
    assert error.value.rcvd is not None
    assert error.value.rcvd.code == NOT_SHOWN
    assert error.value.rcvd.reason.startswith("VM 'web' is not running")
    served.on = True
    with served.look(secret), served.qemu():
        pass


def test_only_the_clients_scripts_are_listed(served: Serving, tmp_path: Path) -> None:
    for path in ("/novnc/app/ui.js", "/novnc/core/x.txt", "/novnc/core", "/static", "/"):
        assert served.ask("GET", path).status == 404
