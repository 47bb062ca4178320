"""web/guard.py: which requests are a page of ours'."""

from __future__ import annotations

import pytest

from drivebay.web.guard import is_ours


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9", "[::1]:8000", "localhost"])
def test_a_page_of_ours_may_ask(host: str) -> None:
    assert is_ours([host], [], origin_needed=False)
    assert is_ours([host], [f"http://{host}"], origin_needed=True)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "127.0.0.1.evil.example:8000",
        "localhost.evil.example",
        "evil.example#127.0.0.1",
        "127.0.0.1@evil.example",
        "user@127.0.0.1:8000",
        "127.0.0.1:8000/",
        "127.0.0.1:port",
        "127.0.0.1;script-src *",
        "127.0.0.1 'unsafe-inline'",
        "[::1",
        "[::1];script-src",
        "x[::1]",
        "localhost.:80",
        "localhost:80\n",
        "localhost:٣",
        "0.0.0.0:8000",
        "2130706433:8000",
        "",
        "löcalhost",
    ],
)
def test_another_name_for_this_host_is_refused(host: str) -> None:
    assert not is_ours([host], [], origin_needed=False)
    assert not is_ours([host], [f"http://{host}"], origin_needed=True)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:8001",
        "http://localhost:8000",
        "https://127.0.0.1:8000",
        "http://127.0.0.1:8000.evil.example",
        "null",
        "",
    ],
)
@pytest.mark.parametrize("needed", [True, False])
def test_a_page_of_another_origin_is_refused(origin: str, needed: bool) -> None:
    assert not is_ours(["127.0.0.1:8000"], [origin], origin_needed=needed)


def test_who_changes_something_has_to_say_from_where() -> None:
    assert not is_ours(["127.0.0.1:8000"], [], origin_needed=True)


def test_a_header_is_there_once() -> None:
    host = "127.0.0.1:8000"
    assert not is_ours([], [], origin_needed=False)
    assert not is_ours([host, host], [], origin_needed=False)
    assert not is_ours([host], [f"http://{host}"] * 2, origin_needed=True)
