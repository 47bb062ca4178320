"""`drivebay vm screen|screenshot`: a VM's screen in the browser, and a picture of it.

Context: a command in the foreground. `screen` serves on 127.0.0.1 until Ctrl-C. Its link works
once; Enter makes another.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE, print_json
from drivebay.errors import HostError, UsageError

if TYPE_CHECKING:
    from drivebay.vm.store import Vm

__all__ = ["RUN", "add_parsers", "add_vnc_options", "screen", "screenshot"]

_ADDRESS: Final = "127.0.0.1"

# The module and the function of a subcommand.
RUN: Final = {"screen": ("vm_screen", "screen"), "screenshot": ("vm_screen", "screenshot")}


class Adder(Protocol):
    """Makes the parser of one subcommand, with the VM's name as its first word."""

    def __call__(self, name: str, text: str) -> Parser: ...


def add_parsers(add: Adder) -> None:
    """Describe the commands."""
    shown = add("screen", "show a VM's screen in the browser, until Ctrl-C")
    shown.add_argument(
        "--port", metavar="N", type=_port, default=0, help="of 127.0.0.1 (default: a free one)"
    )
    shown.add_argument("--no-browser", action="store_true", help="only print the link")
    picture = add("screenshot", "write a picture of a VM's screen")
    picture.add_argument("file", metavar="FILE.png", nargs="?", help="(default: NAME.png)")
    picture.add_argument("--force", action="store_true", help="replace a file")


def add_vnc_options(parser: argparse.ArgumentParser) -> None:
    """What `create` and `set` take; `vm_vnc` reads it."""
    parser.add_argument(
        "--vnc",
        metavar="ADDRESS[:PORT]",
        nargs="?",
        const="",
        help="serve the screen to VNC programs, too (default: at a free port of 127.0.0.1); "
        "'none' for no more",
    )
    parser.add_argument(
        "--vnc-password-file",
        metavar="FILE",
        help="its password; VNC uses the first eight characters. 'none' for none",
    )
    parser.add_argument(
        "--vnc-tls",
        metavar="DIR",
        help="encrypt it, with ca-cert.pem, server-cert.pem and server-key.pem of that folder; "
        "'none' for none",
    )


def screenshot(found: argparse.Namespace) -> int:
    """Write the screen to a file."""
    from drivebay.vm.screen import take_picture
    from drivebay.vm.store import Vms

    vm = Vms().load(found.name)
    path = Path(found.file or f"{vm.name}.png")
    width, height = take_picture(vm, path, replace=found.force)
    if found.json:
        print_json({"name": vm.name, "file": str(path), "width": width, "height": height})
    else:
        print(f"{path}: {width} x {height}, the screen of VM '{vm.name}'")
    return DONE


def screen(found: argparse.Namespace) -> int:
    """Serve the screen until Ctrl-C."""
    import asyncio

    from drivebay.cli.progress import print_line
    from drivebay.vm.screen import connect
    from drivebay.vm.store import Vms
    from drivebay.web.novnc import find_novnc
    from drivebay.web.screen import Door, address_of, application, make_server

    vms = Vms()
    vm = vms.load(found.name)
    novnc = find_novnc(print_line)
    door = Door()
    with _listening(found.port) as listening:
        port = listening.getsockname()[1]
        server = make_server(application(door, lambda name: connect(vms.load(name)), novnc))

        def new_link() -> str:
            return address_of(vm.name, port, door.tokens.issue(vm.name))

        with contextlib.suppress(KeyboardInterrupt), _say(vm, found, new_link(), port):
            asyncio.run(_serve(server.serve(sockets=[listening]), new_link))
    return DONE


async def _serve(serving: Coroutine[Any, Any, None], new_link: Callable[[], str]) -> None:
    """Until the server ends, print a new link for each line that is typed."""
    import asyncio

    loop = asyncio.get_running_loop()

    def typed() -> None:
        if not os.read(sys.stdin.fileno(), 1024):
            loop.remove_reader(sys.stdin)
            return
        print(new_link(), flush=True)

    if sys.stdin.isatty():
        loop.add_reader(sys.stdin, typed)
    await serving


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_ADDRESS, port))
            listening.listen()
        except OSError as error:
            raise HostError(
                f"can't serve the screen on port {port} of {_ADDRESS}",
                error.errno or 0,
                hint="leave out --port, and a free one is taken",
            ) from error
        yield listening


@contextlib.contextmanager
def _say(vm: Vm, found: argparse.Namespace, link: str, port: int) -> Iterator[None]:
    """Say where the screen is, and open it in a browser if there is one."""
    forward = f"ssh -N -L {port}:{_ADDRESS}:{port} {getpass.getuser()}@{_this_host()}"
    if found.json:
        print_json({"name": vm.name, "url": link, "port": port, "ssh": forward})
    else:
        print(f"screen of VM '{vm.name}': {link}")
        print("  The link works once, for five minutes. Enter makes another one, Ctrl-C ends.")
        print(f"  From another machine, first there: {forward}")
    sys.stdout.flush()
    if found.no_browser or found.json or not _has_browser():
        yield
        return
    import threading
    import webbrowser

    with _page_that_leads_to(vm, link) as page:
        # Some browsers are waited for until they end.
        threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()
        yield


@contextlib.contextmanager
def _page_that_leads_to(vm: Vm, link: str) -> Iterator[Path]:
    """A link among a browser's words could be read, and used, by every user of the host."""
    from drivebay.system.files import write_private

    page = vm.folder / "screen.html"
    write_private(page, f'<meta http-equiv="refresh" content="0; url={link}">\n'.encode())
    try:
        yield page
    finally:
        page.unlink(missing_ok=True)


def _has_browser() -> bool:
    at_desk = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(at_desk) and not os.environ.get("SSH_CONNECTION") and sys.stdout.isatty()


def _this_host() -> str:
    """Under which address the other machine knows this one."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else socket.gethostname()


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise UsageError(f"'{text[:40]}' is no port: from 1 to 65535")
    return int(text)
