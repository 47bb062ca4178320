"""Downloads from a server that breaks off, resumes, redirects and lies."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from email.message import Message
from functools import partial
from pathlib import Path

import pytest

from drivebay.cli.main import main
from drivebay.errors import DrivebayError, InUse, StateError, UsageError
from drivebay.vm.images import download
from drivebay.vm.images.download import _Redirects, clean_url, downloaded, fetch_text
from drivebay.vm.images.store import Images
from tests.fakes.web_server import (
    Handler,
    WebServer,
    ends_after,
    in_chunks,
    reset,
    status,
    without_length,
)

pytestmark = pytest.mark.usefixtures("own_folders")

CONTENT = random.Random(9).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(web_server: WebServer) -> WebServer:
    web_server.files["/a.raw"] = CONTENT
    return web_server


@pytest.fixture
def pauses() -> list[float]:
    return []


Fetch = Callable[..., bytes]


@pytest.fixture
def fetch(server: WebServer, pauses: list[float]) -> Fetch:
    def run(path: str = "/a.raw", expected: str | None = None) -> bytes:
        with downloaded(server.address + path, expected, pause=pauses.append) as found:
            return found.read_bytes()

    return run


def parts(tmp_path: Path) -> list[int]:
    """The sizes of what was kept."""
    return [path.stat().st_size for path in (tmp_path / "cache").rglob("*.part")]


# ---- the whole file -----------------------------------------------------------------------------


def test_a_file_comes_whole_and_leaves_nothing(
    server: WebServer, fetch: Fetch, tmp_path: Path
) -> None:
    assert fetch(expected=SHA256) == CONTENT
    assert fetch(expected=hashlib.sha512(CONTENT).hexdigest()) == CONTENT
    assert parts(tmp_path) == []
    assert server.ranges() == [None, None]


def test_an_early_end_is_seen_and_made_up_for(
    server: WebServer, fetch: Fetch, pauses: list[float]
) -> None:
    server.faults = [ends_after(100_000), ends_after(50_000), reset]
    assert fetch() == CONTENT
    assert server.ranges() == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert server.asked[1].headers["If-Range"] == '"v1"'
    assert pauses == [1.0, 2.0, 4.0]


def test_after_a_few_tries_it_says_how_far_it_came_and_goes_on_later(
    server: WebServer, fetch: Fetch, tmp_path: Path
) -> None:
    server.faults = [ends_after(10_000)] * 5
    with pytest.raises(StateError, match=r"broke off 5 times .*: 48.8 KiB of 293 KiB came") as it:
        fetch()
    assert it.value.hint == "run the command again: it goes on there"
    assert parts(tmp_path) == [50_000]
    assert fetch() == CONTENT
    assert server.ranges()[-1] == "bytes=50000-"


def test_tries_that_bring_much_are_no_failures(
    server: WebServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PROGRESS_BYTES", 10_000)
    server.faults = [ends_after(10_000)] * 9
    assert fetch() == CONTENT


def test_a_date_serves_where_there_is_no_etag(server: WebServer, fetch: Fetch) -> None:
    server.etag, server.modified = None, "Fri, 27 Nov 2026 10:00:00 GMT"
    server.faults = [ends_after(1000)]
    assert fetch() == CONTENT
    assert server.asked[1].headers["If-Range"] == server.modified


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_mark_it_begins_anew(
    server: WebServer, fetch: Fetch, etag: str | None
) -> None:
    server.etag = etag
    server.faults = [ends_after(1000)]
    assert fetch() == CONTENT
    assert server.ranges() == [None, None]
    server.faults = [ends_after(1000)] * 5
    with pytest.raises(StateError, match="broke off") as caught:
        fetch()
    assert "begins anew" in str(caught.value.hint)


def test_a_file_that_changed_meanwhile_is_not_patched_together(
    server: WebServer, fetch: Fetch
) -> None:
    def change(handler: Handler) -> None:
        handler.send_file(1000)
        server.etag = '"v2"'
        server.files["/a.raw"] = CONTENT[::-1]

    server.faults = [change]
    assert fetch() == CONTENT[::-1]
    assert server.ranges() == [None, "bytes=1000-"]


def test_a_whole_file_is_not_fetched_again(server: WebServer, tmp_path: Path, fetch: Fetch) -> None:
    url = server.address + "/a.raw"
    with pytest.raises(KeyboardInterrupt), downloaded(url):
        raise KeyboardInterrupt
    assert parts(tmp_path) == [len(CONTENT)]
    assert fetch() == CONTENT
    assert server.ranges() == [None, f"bytes={len(CONTENT)}-"]


def test_notes_that_make_no_sense_are_not_believed(
    server: WebServer, tmp_path: Path, fetch: Fetch
) -> None:
    for text in ("", "[]", '{"validator": 1, "total": 2}', '{"validator": "x", "total": "y"}'):
        server.faults = [ends_after(1000)] * 5
        with pytest.raises(StateError):
            fetch()
        next((tmp_path / "cache").rglob("*.json")).write_text(text)
        server.asked.clear()
        assert fetch() == CONTENT
        assert server.ranges() == [None]


KILLED = "from drivebay.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"


def test_it_goes_on_after_the_tool_was_killed(server: WebServer, tmp_path: Path) -> None:
    stalled, release = threading.Event(), threading.Event()

    def stall(handler: Handler) -> None:
        handler.send_file(280_000)
        handler.wfile.flush()
        stalled.set()
        release.wait(30)

    server.faults = [stall]
    words = ["image", "import", server.address + "/a.raw"]
    tool = subprocess.Popen([sys.executable, "-c", KILLED, *words])
    try:
        assert stalled.wait(30)
        deadline = threading.Event()
        while not any(parts(tmp_path)) and not deadline.wait(0.01):
            assert tool.poll() is None
    finally:
        tool.send_signal(signal.SIGKILL)
        tool.wait()
        release.set()
    kept = parts(tmp_path)
    assert kept[0] > 0
    assert Images().names() == []
    assert main(words) == 0
    assert server.ranges() == [None, f"bytes={kept[0]}-"]
    assert Images().get("a").path.read_bytes()[: len(CONTENT)] == CONTENT


def test_two_do_not_fetch_the_same_file_at_once(server: WebServer) -> None:
    url = server.address + "/a.raw"
    with (
        downloaded(url),
        pytest.raises(InUse, match="somebody is fetching"),
        downloaded(url),
    ):
        pass


# ---- servers that say or do what they should not ------------------------------------------------


def test_a_checksum_that_differs_removes_the_file_and_shows_both(
    fetch: Fetch, tmp_path: Path
) -> None:
    with pytest.raises(StateError, match=f"its SHA256 is {SHA256}, and {'0' * 64} was expected"):
        fetch(expected="0" * 64)
    assert parts(tmp_path) == []


@pytest.mark.parametrize(("code", "hint"), [(404, "address is right"), (403, "name and password")])
def test_a_refusal_is_final(
    server: WebServer, fetch: Fetch, pauses: list[float], code: int, hint: str
) -> None:
    server.faults = [status(code)]
    with pytest.raises(StateError, match=f"has no 'http.*/a.raw' for us: {code}") as caught:
        fetch()
    assert hint in str(caught.value.hint)
    assert pauses == []


def test_a_server_in_trouble_is_asked_again(server: WebServer, fetch: Fetch) -> None:
    server.faults = [status(503), status(429)]
    assert fetch() == CONTENT
    server.faults = [status(500)] * 5
    with pytest.raises(StateError, match="can't fetch .*: the server answers 500"):
        fetch()


def test_nobody_listening_is_said_at_once(server: WebServer, pauses: list[float]) -> None:
    server.close()
    url = server.address + "/a.raw"
    with (
        pytest.raises(StateError, match="can't fetch .*Connection refused"),
        downloaded(url, pause=pauses.append),
    ):
        pass
    with pytest.raises(StateError, match="Connection refused"):
        fetch_text(url, pauses.append)
    assert pauses == []


def test_a_length_that_is_not_said_needs_a_checksum(server: WebServer, fetch: Fetch) -> None:
    server.faults = [without_length]
    with pytest.raises(StateError, match="doesn't say how long"):
        fetch()
    server.faults = [without_length]
    assert fetch(expected=SHA256) == CONTENT


def test_chunks_have_an_end_that_is_seen(server: WebServer, fetch: Fetch) -> None:
    server.faults = [in_chunks]
    assert fetch() == CONTENT
    server.faults = [partial(in_chunks, most=100_000)]
    assert fetch() == CONTENT
    assert server.ranges()[-1] not in (None, "bytes=0-")


def test_more_than_was_announced_is_not_taken(server: WebServer, fetch: Fetch) -> None:
    def lie(handler: Handler) -> None:
        handler.answer(200, CONTENT * 2, {"Content-Length": str(len(CONTENT))})

    server.faults = [lie]
    assert fetch() == CONTENT


def test_a_file_without_end_is_stopped(
    server: WebServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_LENGTH_MOST", 100_000)
    server.faults = [in_chunks]
    with pytest.raises(StateError, match="has no end"):
        fetch()


def test_what_has_no_room_is_refused_before(server: WebServer, fetch: Fetch) -> None:
    server.faults = [lambda handler: handler.answer(200, b"", {"Content-Length": str(1 << 39)})]
    with pytest.raises(StateError, match="is 512 GiB long, and for downloads .* are left"):
        fetch()


def test_a_full_disk_in_the_midst_is_said(
    server: WebServer, fetch: Fetch, small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_tmpfs))
    monkeypatch.setattr(download, "free_bytes", lambda path: 1 << 40)
    server.files["/a.raw"] = CONTENT * 20
    with pytest.raises(DrivebayError, match="can't keep what comes of .*No space left"):
        fetch()
    assert list(small_tmpfs.rglob("*.part")) == []


@pytest.mark.parametrize(
    "span", ["bytes 0-9/300000", "bytes 1000-1999/2000", "nonsense", None, "bytes 1000-1500/300000"]
)
def test_a_range_that_was_not_asked_for_is_not_used(
    server: WebServer, fetch: Fetch, span: str | None
) -> None:
    def wrong(handler: Handler) -> None:
        handler.answer(206, b"x" * 1000, {"Content-Range": span})

    server.faults = [ends_after(1000), wrong]
    assert fetch() == CONTENT
    server.faults = [wrong]
    with pytest.raises(StateError, match="sends a part of"):
        fetch()


def test_a_refused_range_begins_anew(server: WebServer, fetch: Fetch) -> None:
    server.faults = [ends_after(1000), status(416, Content_Range="bytes */5")]
    assert fetch() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", None]


def test_packing_that_nobody_asked_for_is_refused(server: WebServer, fetch: Fetch) -> None:
    server.faults = [status(200, Content_Encoding="gzip")]
    with pytest.raises(StateError, match="packed, which nobody asked for"):
        fetch()
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


# ---- redirections, credentials, proxies ---------------------------------------------------------


def test_a_redirection_is_followed_without_the_password(
    server: WebServer, pauses: list[float]
) -> None:
    server.faults = [status(302, Location="/a.raw"), ends_after(1000)]
    url = server.address.replace("//", "//me:se%40cret@") + "/first?token=1"
    server.faults.append(status(302, Location="/a.raw"))
    with downloaded(url, pause=pauses.append) as found:
        assert found.read_bytes() == CONTENT
    assert [asked.path for asked in server.asked] == ["/first?token=1", "/a.raw"] * 2
    assert [asked.headers["Authorization"] for asked in server.asked] == [
        "Basic bWU6c2VAY3JldA==", None
    ] * 2  # fmt: skip
    assert server.ranges()[-1] == "bytes=1000-"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/first", "leads in a circle"),
        ("ftp://example.org/a", "'ftp://example.org/a' can't be fetched"),
        ("file:///etc/passwd", "leads .* to what is no web address"),
    ],
)
def test_a_redirection_that_leads_nowhere(
    server: WebServer, fetch: Fetch, where: str, message: str
) -> None:
    server.faults = [status(302, Location=where)] * 20
    with pytest.raises(DrivebayError, match=message):
        fetch("/first")


def test_a_redirection_from_https_to_http_is_refused() -> None:
    asked = urllib.request.Request("https://example.org/a")
    follow = partial(_Redirects().redirect_request, asked, None, 302, "Found", Message())  # type: ignore[arg-type]
    with pytest.raises(StateError, match="leads from https to http"):
        follow("http://example.org/a")
    assert follow("https://mirror.example.org/a") is not None


@pytest.mark.parametrize(
    "url",
    ["ftp://h/a", "http:///a", "http://h:x/a", "http://h:99999/a", "http://h/a\nb", "https://[/a"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="is no address|can't be fetched"), downloaded(url):
        pass


def test_an_address_is_shown_without_secrets() -> None:
    shown = clean_url("https://me:secret@h.org:8/a%20b?X-Signature=1#x")
    assert shown == "https://h.org:8/a%20b"


def test_a_proxy_is_used_unless_no_proxy_names_the_host(
    server: WebServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["http://images.invalid/b c.raw"] = b""
    server.files["http://images.invalid/a.raw"] = CONTENT
    monkeypatch.setenv("http_proxy", server.address)
    with downloaded("http://images.invalid/a.raw") as found:
        assert found.read_bytes() == CONTENT
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch() == CONTENT
    assert [asked.path for asked in server.asked] == ["http://images.invalid/a.raw", "/a.raw"]
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(UsageError, match="is no proxy"), downloaded("http://images.invalid/a"):
        pass
