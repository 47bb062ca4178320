"""A network's creation and deletion, killed before each of their effects in turn, and mended.

Context: a program that the test runs in a namespace of its own. A child does the change, and ends
by SIGKILL just before its effect number N; then a command like a person's next one has to put all
right. N goes up until a child comes to its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyroute2  # noqa: F401 - now, and not in each child

from drivebay.cli.main import main
from drivebay.net import firewall, forwarding, journal, leases, links, members, store, uplinks
from drivebay.net.reconcile import state

# Each function through which the world is changed.
EFFECTS = (
    (store.Networks, "create"),
    (store.Networks, "mark_made"),
    (store.Networks, "delete"),
    (journal, "write_private"),
    (forwarding, "write_private"),
    (forwarding, "_write"),
    (leases, "write_public"),
    (leases, "start"),
    (leases, "start_ticks"),
    (members, "write_public"),
    (firewall, "_nft"),
    (links, "add_bridge"),
    (links, "set_link"),
    (links, "shut_out_ipv6"),
    (links, "add_address"),
    (links, "remove_bridge"),
    (uplinks, "set_link"),
)
NAME = "lan"
DELETE = ["net", "delete", NAME, "--yes", "-q"]
START = ["net", "start", NAME, "-q"]


def killed_before(effect: int, words: list[str]) -> bool:
    """Run a command of ours in a child that is killed; False when it has come to its end."""
    child = os.fork()
    if child == 0:
        left = [effect]
        for owner, name in EFFECTS:
            setattr(owner, name, counted(getattr(owner, name), left))
        os._exit(main(words))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (effect, words)
    return os.WIFSIGNALED(status)


def counted(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*values: Any, **named: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*values, **named)

    return call


def ok(words: list[str]) -> None:
    assert main(words) == 0, words


def picture() -> list[str]:
    """What is on the host, but for its locks."""
    folder = store.Networks().folder
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
    return [
        rules.stdout,
        forwarding._SWITCH.read_text(),
        *sorted(f"{link.name} {link.up} {link.master}" for link in links.all_links().values()),
        *sorted(path.name for path in folder.glob("*") if not path.name.startswith(".lock")),
        *(path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if is_of(folder, path)),
    ]


def is_of(folder: Path, command: Path) -> bool:
    try:
        return str(folder) in command.read_text()
    except OSError:
        return False


def is_there() -> bool:
    return NAME in store.Networks().names()


def is_up() -> bool:
    networks = store.Networks()
    return state(networks, networks.load(NAME)) == "up"


def kill_creations(create: list[str], before: list[str]) -> int:
    """Each is mended by the same command again, by a start, or by a deletion."""
    kills = 0
    while killed_before(kills, create):
        if kills % 3 == 0:
            ok(create)
            assert is_up(), kills
        elif kills % 3 == 1 and is_there():
            ok(START)
            assert is_up(), kills
        if is_there():
            ok(DELETE)
        assert picture() == before, (kills, picture(), before)
        kills += 1
    return kills


def kill_deletions(create: list[str], before: list[str]) -> int:
    """Each is mended by the same command again, or by a start, as that of a VM has it."""
    kills = 0
    while killed_before(kills, DELETE):
        if kills % 2 and is_there():
            ok(START)
            assert is_up(), kills
        else:
            ok(DELETE)
            assert picture() == before, (kills, picture(), before)
            ok(create)
        kills += 1
    assert picture() == before
    return kills


def run(create: list[str]) -> tuple[int, int]:
    """Returns: in how many places a creation was killed, and a deletion."""
    ok(create)
    ok(DELETE)
    before = picture()
    return kill_creations(create, before), kill_deletions(create, before)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # no power cut is played, and this takes half of the time
    print(*run(["net", "create", NAME, "-q", *sys.argv[1:]]), file=sys.stderr)
