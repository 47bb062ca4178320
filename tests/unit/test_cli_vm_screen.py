"""cli/vm_screen.py as a process of its own: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from drivebay.cli import vm_screen
from tests.unit.vm_world import World

HELLO = "screen of VM 'web': http://127.0.0.1:"


@pytest.fixture
def web(world: World) -> World:
    """A VM, and a client that was fetched before."""
    world.vm("web")
    client = world.folder / "cache/drivebay/novnc/tree/core/rfb.js"
    client.parent.mkdir(parents=True)
    client.write_text("// a client")
    return world


def words(*more: str) -> list[str]:
    return ["-m", "drivebay", "vm", "screen", *more]


@contextmanager
def at_a_terminal(*more: str, **environment: str) -> Iterator[pexpect.spawn[str]]:
    """Ctrl-C ends it well."""
    told = {**os.environ, "SSH_CONNECTION": "", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    screen = pexpect.spawn(
        sys.executable, words("web", *more), encoding="utf-8", timeout=60,
        env={**told, **environment}, dimensions=(24, 300),
    )  # fmt: skip
    try:
        screen.expect(HELLO)
        yield screen
        screen.sendintr()
        screen.expect(pexpect.EOF)
        screen.close()
        assert screen.exitstatus == 0
    finally:
        screen.close(force=True)


def test_enter_makes_another_link(web: World) -> None:
    with at_a_terminal() as screen:
        screen.expect(r"/screen/web#token=(\S+)")
        first = screen.match[1]
        screen.sendline()
        screen.expect(r"http://127.0.0.1:\d+/screen/web#token=(\S+)")
        assert screen.match[1] != first


def test_from_another_machine_ssh_leads_there(web: World) -> None:
    with at_a_terminal(SSH_CONNECTION="192.0.2.1 4711 192.0.2.2 22") as screen:
        screen.expect(r"(\d+)/screen")
        port = screen.match[1]
        screen.expect_exact(f"ssh -N -L {port}:127.0.0.1:{port} ")
        screen.expect(r"@192\.0\.2\.2\s")


def test_a_browser_learns_the_link_from_a_file_of_ours(web: World) -> None:
    """A program's words can be read by every user; the file is gone at the end."""
    seen = web.folder / "seen"
    browser = web.folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$*" > {seen}.new\ncat "${{1#file://}}" >> {seen}.new\n'
                       f"mv {seen}.new {seen}\n")  # fmt: skip
    browser.chmod(0o755)
    page = web.vms.folder / "web/screen.html"
    with at_a_terminal(DISPLAY=":9", BROWSER=str(browser)) as screen:
        screen.expect(r"(\d+)/screen/web#token=(\S+)")
        link = f"http://127.0.0.1:{screen.match[1]}/screen/web#token={screen.match[2]}"
        until = time.monotonic() + 20
        while not seen.exists():
            assert time.monotonic() < until, "no browser was opened"
            time.sleep(0.01)
        line, html = seen.read_text().split("\n", 1)
        assert line == page.as_uri()
        assert f"url={link}" in html
        assert page.stat().st_mode & 0o777 == 0o600
    assert not page.exists()


@pytest.mark.parametrize(
    ("environment", "has"),
    [
        ({"DISPLAY": ":0"}, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True),
        ({}, False),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "192.0.2.1 4711 192.0.2.2 22"}, False),
    ],
)
def test_a_browser_is_opened_where_somebody_sits(
    environment: dict[str, str], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert vm_screen._has_browser() == has
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert not vm_screen._has_browser()


def test_json_has_the_link_and_its_parts(web: World) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, *words("web", "--json", "--port", str(port))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        said = json.loads(text)
        taken = subprocess.run(
            [sys.executable, *words("web", "--port", str(port))], capture_output=True, text=True
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert (said["name"], said["port"]) == ("web", port)
    assert said["url"].startswith(f"http://127.0.0.1:{port}/screen/web#token=")
    assert taken.returncode == 1
    assert f"port {port} of 127.0.0.1: Address already in use" in taken.stderr


def test_there_has_to_be_such_a_vm_and_such_a_port(web: World, tmp_path: Path) -> None:
    from drivebay.cli.vm import main
    from drivebay.errors import NotFound, UsageError

    with pytest.raises(NotFound, match="there is no VM 'db'"):
        main(["screen", "db"])
    for port in ("0", "65536", "x", "-1", "٣"):
        with pytest.raises(UsageError, match="is no port"):
            main(["screen", "web", f"--port={port}"])
    assert vm_screen.RUN.keys() == {"screen", "screenshot"}
