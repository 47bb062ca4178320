"""Plans that are shown, asked about, done and taken back; and the progress of long work."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from functools import partial

import pytest

from drivebay.cli.progress import Progress, watch
from drivebay.cli.steps import carry_out
from drivebay.disks.plan import Plan
from drivebay.errors import HostError, StateError


def options(**given: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"dry_run": False, "json": False, "yes": False, **given})


def recorded_plan(log: list[str], failing: str = "") -> Plan:
    plan = Plan(["a disk"])

    def act(name: str) -> None:
        log.append(name)
        if name == failing:
            raise HostError(f"can't {name}", 5)

    for name in ("one", "two", "three"):
        undo = None if name == "two" else partial(act, f"no {name}")
        plan.add(f"do {name}", partial(act, name), undo)
    return plan


def test_a_failure_takes_back_what_was_done_last_first() -> None:
    log: list[str] = []
    with pytest.raises(HostError, match="can't three"):
        recorded_plan(log, "three").run()
    assert log == ["one", "two", "three", "no one"]


def test_what_cannot_be_taken_back_is_said_and_the_first_failure_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log: list[str] = []
    plan = recorded_plan(log, "three")
    plan.undo_last(lambda: None)
    plan.add("never", lambda: log.append("never"))

    def refuse() -> None:
        raise HostError("the disk is gone", 5)

    broken = Plan()
    broken.add("first", lambda: None, refuse)
    broken.add("second", lambda: recorded_plan([], "one").run())
    with pytest.raises(HostError, match="can't one"):
        carry_out(broken, options())
    assert "this could not be taken back (first): the disk is gone" in capsys.readouterr().err


def test_a_dry_run_shows_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    assert not carry_out(recorded_plan(log), options(dry_run=True), "Really?")
    assert log == []
    assert capsys.readouterr().out == "a disk\nwould do one\nwould do two\nwould do three\n"
    assert not carry_out(recorded_plan(log), options(dry_run=True, json=True))
    assert '"would"' in capsys.readouterr().out


def test_without_a_terminal_a_question_is_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    with pytest.raises(StateError, match=r"without a terminal: Really\?") as caught:
        carry_out(recorded_plan(log), options(), "Really?")
    assert caught.value.hint == "add --yes if it may"
    assert log == []
    assert capsys.readouterr().err == "a disk\n  - do one\n  - do two\n  - do three\n"
    assert carry_out(recorded_plan(log), options(yes=True), "Really?")
    assert log == ["one", "two", "three"]


ASKING = """
import argparse
from drivebay.cli.steps import carry_out
from drivebay.disks.plan import Plan
from drivebay.errors import StateError
plan = Plan(["a disk"])
plan.add("wipe it", lambda: print("wiped"))
try:
    carry_out(plan, argparse.Namespace(dry_run=False, json=False, yes=False), "Really?")
except StateError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (b"y\n", b"wiped"),
        (b"YES\n", b"wiped"),
        (b"n\n", b"not confirmed, so nothing was changed"),
        (b"\n", b"not confirmed, so nothing was changed"),
        (b"\x04", b"not confirmed, so nothing was changed"),
    ],
)
def test_only_yes_goes_on_at_a_terminal(typed: bytes, said: bytes) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
    )
    try:
        shown = b""
        while b"[y/N] " not in shown:
            shown += os.read(ours, 1000)
        assert b"a disk" in shown
        assert b"- wipe it" in shown
        os.write(ours, typed)
        out, _ = process.communicate(timeout=30)
        assert said in out
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bar_is_drawn_after_a_second_and_taken_away() -> None:
    terminal, clock = Terminal(), Clock()
    with Progress("copying web", terminal, clock) as bar:
        bar.update(1, 10)
        assert terminal.getvalue() == ""
        clock.now = 2.0
        bar.update(5, 10)
        bar.update(6, 10)  # too soon after the last one
        assert terminal.getvalue() == (
            "\rcopying web [###############...............]  50%  0:02 left\x1b[K"
        )
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_no_terminal_sees_no_bar() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("copying web", stream, clock) as bar:
        clock.now = 2.0
        bar.update(5, 10)
    assert stream.getvalue() == ""


def test_work_without_size_is_whole() -> None:
    terminal, clock = Terminal(), Clock()
    bar = Progress("x", terminal, clock)
    clock.now = 2.0
    bar.update(0, 0)
    assert "100%" in terminal.getvalue()


def test_watched_work_raises_what_it_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drivebay.cli.progress._QUIET_S", 0.02)

    def work() -> None:
        time.sleep(0.1)
        raise HostError("no space", 28)

    looks: list[int] = []

    def look() -> tuple[int, int]:
        looks.append(1)
        return 1, 2

    with pytest.raises(HostError, match="no space"):
        watch("x", work, look)
    assert looks
