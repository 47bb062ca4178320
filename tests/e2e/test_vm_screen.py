"""Debian's installer, looked at and typed at in a real browser; and who sees nothing of it.

One guest for all: the installer's first question, the language, comes after a minute or more.
Until then the firmware's words are on the screen.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pexpect
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from drivebay.web.novnc import find_novnc
from drivebay.web.tokens import TOKEN_SECONDS, Tokens
from tests.e2e.debian_installer import installer_iso
from tests.e2e.vm_bay import VmBay
from tests.fakes.rfb_client import is_let_in
from tests.fakes.web_server import WebServer
from tests.unit.web_serving import Serving

pytestmark = pytest.mark.needs_qemu

CHROMIUM = "/usr/bin/chromium"
SHOWN_MS = 60_000
MENU_SECONDS = 600.0
CHANGE_SECONDS = 60.0
A_LINE_PIXELS = 1500  # of a line that is marked; a cursor that blinks is some 20

# Keeps a copy of what is on the canvas, and says how large it is and which colour is the most.
LOOK = """name => {
  const canvas = document.querySelector("#screen canvas");
  const { width, height } = canvas;
  const pixels = new Uint32Array(
    canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer);
  const counts = new Map();
  for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
  const [common, most] = [...counts].reduce((a, b) => (b[1] > a[1] ? b : a));
  (window.kept ??= {})[name] = pixels.slice();
  return { width, height, colours: counts.size, black: (common & 0xffffff) === 0,
           share: most / pixels.length };
}"""

# How many pixels of two such copies differ.
DIFFER = """([one, other]) => {
  const [a, b] = [window.kept[one], window.kept[other]];
  if (a.length !== b.length) return Math.max(a.length, b.length);
  return a.reduce((sum, pixel, at) => sum + (pixel !== b[at]), 0);
}"""

# A page of another origin tries what ours does.
FOREIGN = """async ([host, token]) => {
  const session = await fetch(`http://${host}/screen/d/session`, {
    method: "POST", mode: "no-cors", body: JSON.stringify({ token }),
  }).then((answer) => answer.type, () => "failed");
  const socket = await new Promise((done) => {
    const tried = new WebSocket(`ws://${host}/screen/d/socket`, ["binary", `drivebay.${token}`]);
    tried.onopen = () => done("open");
    tried.onclose = () => done("closed");
  });
  const script = await import(`http://${host}/static/words.js`).then(() => "read", () => "kept");
  const frame = document.createElement("iframe");
  frame.src = `http://${host}/screen/d`;
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; setTimeout(done, 2000); });
  let inside = null;
  try { inside = frame.contentDocument?.title ?? null; } catch { /* of another origin */ }
  return { session, socket, script, inside };
}"""


class Screen:
    """`drivebay vm screen` at a terminal."""

    def __init__(self, name: str) -> None:
        words = ["-m", "drivebay", "vm", "screen", name, "--no-browser"]
        self._terminal = pexpect.spawn(
            sys.executable, words, encoding="utf-8", timeout=60, dimensions=(24, 400)
        )
        self._first = self._link()

    def _link(self) -> str:
        self._terminal.expect(r"http://(127\.0\.0\.1:\d+)/screen/\w+#token=(\S+)")
        self.host: str = self._terminal.match[1]
        return str(self._terminal.match[0])

    def link(self) -> str:
        """A new one."""
        self._terminal.sendline()
        return self._link()

    def close(self) -> None:
        self._terminal.sendintr()
        self._terminal.expect(pexpect.EOF)
        self._terminal.close()
        assert self._terminal.exitstatus == 0


@pytest.fixture(scope="module")
def installer(vm_bay: VmBay) -> str:
    """It runs; its VM's name."""
    vm_bay.start_target()
    words = ["--image", "none", "--disk", "1G", "--memory", "1G", "--iso", str(installer_iso())]
    vm_bay.vm("create", "d", *words, "--start")
    return "d"


@pytest.fixture(scope="module")
def screen(installer: str) -> Iterator[Screen]:
    shown = Screen(installer)
    yield shown
    shown.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Root's needs to be told that it shall run."""
    words = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=words)
        yield started
        started.close()


@pytest.fixture(scope="module")
def tab(screen: Screen, browser: Browser) -> Page:
    """A tab that has followed a link, and is open from the firmware to the end."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.goto(screen.link())
    wait_for(page, "shown")
    return page


def wait_for(page: Page, state: str) -> str:
    """Until the page says so; its words."""
    page.wait_for_selector(f"body[data-state={state}]", timeout=SHOWN_MS)
    return page.inner_text("#state")


def fresh_tab(browser: Browser) -> Page:
    """Of a browser that knows nothing."""
    return browser.new_context().new_page()


def until(what: str, seconds: float, true: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited for in vain: {what}"
        time.sleep(0.5)


# ---- programs that speak VNC --------------------------------------------------------------------


def make_certificates(folder: Path) -> ssl.SSLContext:
    """Of a server, and of a client that the same authority knows; what that client brings."""
    new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for words in (
        f"req -x509 {new} -days 2 -subj /CN=ca -keyout ca-key.pem -out ca-cert.pem",
        f"req {new} -subj /CN=host -keyout server-key.pem -out request",
        "x509 -req -in request -CA ca-cert.pem -CAkey ca-key.pem -days 2 -out server-cert.pem",
    ):
        subprocess.run(
            ["openssl", *words.split()], cwd=folder, check=True, capture_output=True, timeout=60
        )
    context = stranger(folder)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    return context


def stranger(folder: Path) -> ssl.SSLContext:
    """Who knows the server, and has no certificate."""
    context = ssl.create_default_context(cafile=folder / "ca-cert.pem")
    context.check_hostname = False
    return context


def test_vnc_programs_need_the_password_or_a_certificate(
    vm_bay: VmBay, installer: str, tmp_path: Path
) -> None:
    """No guest has to start for that, so the installer starts beside it.

    The file and the folder are closed to QEMU's own user.
    """
    known = make_certificates(tmp_path)
    unknown = stranger(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("secret123\n")
    secret.chmod(0o600)
    words = ["v", "--image", "none", "--disk", "16M", "--memory", "64M"]
    vm_bay.vm("create", *words, "--vnc", "0.0.0.0", "--vnc-password-file", str(secret), "--start")
    port = vm_bay.info("v")["vnc"]["port"]
    assert is_let_in(port, "secret12"), "eight characters count"
    assert not is_let_in(port, "secret1")
    assert not is_let_in(port)

    vm_bay.vm("set", "v", "--vnc-tls", str(tmp_path))
    vm_bay.vm("restart", "v", "--force")
    assert is_let_in(port, "secret12", unknown)
    assert not is_let_in(port, "secret21", unknown)
    assert not is_let_in(port, "secret12"), "it goes without encryption"

    vm_bay.vm("set", "v", "--vnc-password-file", "none")
    vm_bay.vm("restart", "v", "--force")
    assert is_let_in(port, "", known)
    assert not is_let_in(port, "", unknown)
    vm_bay.vm("stop", "v", "--force")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", port))
        taken.listen()
        said = vm_bay.refused("vm", "start", "v")
    assert "Address already in use" in said
    assert "vm set v --vnc ADDRESS:PORT" in said


# ---- in a browser ------------------------------------------------------------------------------


def test_the_firmware_is_seen(tab: Page) -> None:
    until("a text on black", CHANGE_SECONDS, lambda: tab.evaluate(LOOK, "firmware")["colours"] > 1)
    assert tab.evaluate(LOOK, "firmware")["black"]
    assert "token" not in tab.url


def test_without_a_link_that_works_nothing_is_seen(screen: Screen, browser: Browser) -> None:
    link = screen.link()
    page = fresh_tab(browser)
    page.goto(link)
    wait_for(page, "shown")
    page.reload()
    wait_for(page, "shown")
    bare = link.partition("#")[0]
    for wrong in (link, bare, bare + "#token=", bare + "#token=" + "x" * 43):
        other = fresh_tab(browser)
        other.goto(wrong)
        assert "does not open the screen" in wait_for(other, "refused")
        assert other.locator("canvas").count() == 0
        other.context.close()
    page.context.close()


def test_an_old_link_shows_nothing(browser: Browser) -> None:
    """On a server whose clock a test can turn."""
    now = [0.0]
    served = Serving(find_novnc(print))
    served.door.tokens = Tokens(lambda: now[0])
    try:
        tokens = [served.door.tokens.issue("web") for _ in range(2)]
        page = fresh_tab(browser)
        now[0] += TOKEN_SECONDS
        page.goto(f"http://{served.host}/screen/web#token={tokens[0]}")
        wait_for(page, "refused")
        assert served.qemus.empty()
        page.context.close()
    finally:
        served.close()


def test_a_page_of_another_origin_sees_nothing(screen: Screen, browser: Browser) -> None:
    link = screen.link()
    token = link.partition("#token=")[2]
    with closing(WebServer()) as foreign:
        foreign.files["/"] = b"<!doctype html><title>foreign</title><body>"
        page = fresh_tab(browser)
        page.goto(f"{foreign.address}/")
        assert page.evaluate(FOREIGN, [screen.host, token]) == {
            "session": "failed", "socket": "closed", "script": "kept", "inside": None,
        }  # fmt: skip
        page.goto(link)  # it was not even used up
        wait_for(page, "shown")
        page.context.close()


def test_the_installer_is_seen_and_a_key_changes_it(
    tab: Page, screen: Screen, browser: Browser, vm_bay: VmBay, tmp_path: Path
) -> None:
    def is_menu() -> bool:
        seen = tab.evaluate(LOOK, "menu")
        return not seen["black"] and seen["colours"] > 2 and seen["share"] < 0.95

    until("the installer's menu", MENU_SECONDS, is_menu)
    until("a menu that stays", CHANGE_SECONDS, lambda: stays(tab, "menu"))
    assert tab.evaluate(DIFFER, ["firmware", "menu"]) > 100 * A_LINE_PIXELS
    tab.keyboard.press("ArrowUp")
    until("another line that is marked", CHANGE_SECONDS, lambda: differs(tab, "menu", "other"))
    tab.keyboard.press("ArrowDown")
    until("the first line again", CHANGE_SECONDS, lambda: not differs(tab, "menu", "again"))

    second = fresh_tab(browser)
    second.goto(screen.link())
    wait_for(second, "shown")
    second.set_viewport_size({"width": 390, "height": 700})
    box = second.locator("#screen canvas").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    second.context.close()

    picture = tmp_path / "installer.png"
    said = json.loads(vm(vm_bay, "screenshot", "d", str(picture), "--json").stdout)
    seen = tab.evaluate(LOOK, "end")
    assert (said["width"], said["height"]) == (seen["width"], seen["height"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def vm(vm_bay: VmBay, *words: str) -> subprocess.CompletedProcess[str]:
    """As a process of its own: playwright has this thread's event loop, and QMP wants one."""
    done = vm_bay.program("vm", *words)
    assert done.returncode == 0, done.stderr
    return done


def differs(tab: Page, one: str, now: str) -> bool:
    tab.evaluate(LOOK, now)
    return bool(tab.evaluate(DIFFER, [one, now]) > A_LINE_PIXELS)


def stays(tab: Page, name: str) -> bool:
    tab.evaluate(LOOK, name)
    time.sleep(1)
    return not differs(tab, name, "later")


def test_the_end_of_the_vm_is_said_and_its_return_seen(tab: Page, vm_bay: VmBay) -> None:
    vm(vm_bay, "stop", "d", "--force")
    assert wait_for(tab, "off") == "VM 'd' is not running. Trying again …"
    vm(vm_bay, "start", "d")
    wait_for(tab, "shown")
