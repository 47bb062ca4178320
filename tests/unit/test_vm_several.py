"""vm/several.py: VMs beside each other, of which one that fails hurts no other."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, InUse, NotFound, StateError
from drivebay.vm import several
from drivebay.vm.kvm import Accelerator
from drivebay.vm.lifecycle import Started
from drivebay.vm.qemu import Qemu
from drivebay.vm.run import Running
from drivebay.vm.several import beside_each_other, start_several, stop_several
from drivebay.vm.spec import DiskSpec
from tests.fakes.qemu_monitor import FakeMonitor
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process

QEMU = Qemu(Path("/q"), (7, 2), frozenset(), ("pc-q35-7.2",), "pc-q35-7.2")
WAIT_S = 20


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "find_qemu", lambda named: QEMU)
    monkeypatch.setattr(several, "choose_accelerator", lambda: Accelerator("tcg", ""))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


def test_as_many_work_at_once_as_are_allowed() -> None:
    together = threading.Barrier(2)
    found = list(beside_each_other(["a", "b", "c", "d"], lambda _: together.wait(WAIT_S), 2))
    assert sorted(outcome.name for outcome in found) == ["a", "b", "c", "d"]
    alone = threading.Semaphore(1)

    def once(name: str) -> bool:
        if not alone.acquire(blocking=False):
            return False
        threading.Event().wait(0.01)  # time for another to come in, if one could
        alone.release()
        return True

    assert all(outcome.result for outcome in beside_each_other(["a", "b", "c"], once, 1))
    assert list(beside_each_other([], once, 0)) == []


def test_an_error_is_told_and_keeps_no_other_from_its_turn() -> None:
    def act(name: str) -> str:
        if name == "a":
            raise StateError("no")
        return name * 2

    first, second = beside_each_other(["a", "b"], act, 1)
    assert (first.name, str(first.error), first.result) == ("a", "no", None)
    assert (second.name, second.error, second.result) == ("b", None, "bb")


def test_what_is_no_error_of_ours_comes_to_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(beside_each_other(["a", "b"], lambda _: 1 // 0, 1))


def test_an_interrupted_caller_waits_for_those_at_work_and_begins_no_other() -> None:
    done: list[str] = []
    go_on = threading.Event()

    def act(name: str) -> None:
        if name == "b":
            go_on.wait(WAIT_S)
        done.append(name)

    outcomes = beside_each_other(["a", "b", "c", "d"], act, 1)
    assert next(outcomes).name == "a"
    threading.Timer(0.01, go_on.set).start()
    outcomes.close()  # type: ignore[attr-defined]
    assert done == ["a", "b"]


def test_what_may_be_abandoned_is_not_waited_for() -> None:
    never = threading.Event()
    outcomes = beside_each_other(
        ["a", "b"], lambda name: name == "a" or never.wait(WAIT_S), 2, abandoned=True
    )
    assert next(outcomes).name == "a"
    outcomes.close()  # type: ignore[attr-defined]
    never.set()


def test_one_that_does_not_start_hurts_no_other(
    world: World, no_qemu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.vm("good")
    started = Started(Running(1, 2, "tcg", "/q", ""), 0.5)

    def start(vms: object, name: str, socket: str | None) -> Started:
        if name != "good":
            raise NotFound(f"there is no VM '{name}'")
        assert socket == world.socket
        return started

    monkeypatch.setattr("drivebay.vm.lifecycle.start", start)
    found = {each.name: each for each in start_several(world.vms, ["bad", "good"], world.socket)}
    assert found["good"].result == started
    assert "no VM 'bad'" in str(found["bad"].error)


def test_a_target_is_there_before_any_start(
    world: World, no_qemu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.pool()
    world.volume("x")
    world.vm("a", DiskSpec("d", "p/x"))
    asked: list[str | None] = []

    def refuse(socket: str | None) -> None:
        asked.append(socket)
        raise DrivebayError("no target")

    monkeypatch.setattr(several, "connect_or_start", refuse)
    with pytest.raises(DrivebayError, match="no target"):
        list(start_several(world.vms, ["a"]))
    assert asked == [None]
    world.vm("without")
    monkeypatch.setattr("drivebay.vm.lifecycle.start", lambda *words: None)
    assert [each.name for each in start_several(world.vms, ["without"])] == ["without"]
    assert asked == [None]


def test_all_are_asked_to_stop_at_the_same_time(
    world: World, process: subprocess.Popen[bytes]
) -> None:
    names = ["a", "b", "c", "off"]
    together = threading.Barrier(3)
    monitors = []

    def press() -> dict[str, str]:
        together.wait(WAIT_S)  # so none was waited for before another was asked
        process.kill()
        return {}

    for name in names:
        vm = world.vm(name)
        if name != "off":
            seem_to_run(vm, process)
            monitor = FakeMonitor(vm.monitor_socket)
            monitor.answers["system_powerdown"] = lambda arguments: press()
            monitors.append(monitor)
    found = {each.name: each.result for each in stop_several(world.vms, names, timeout_s=WAIT_S)}
    assert found == {"a": "off", "b": "off", "c": "off", "off": None}
    for monitor in monitors:
        monitor.close()


def test_one_that_somebody_else_changes_is_told(world: World) -> None:
    world.vm("a")
    with world.vms.locked("a"):
        (found,) = stop_several(world.vms, ["a"])
    assert isinstance(found.error, InUse)
