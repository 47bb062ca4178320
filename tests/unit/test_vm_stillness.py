"""vm/stillness.py: how a running VM is held still, with an agent and without."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Self

import pytest

from drivebay.disks.connection import RpcRefused, call
from drivebay.disks.inventory import Disk
from drivebay.errors import StateError
from drivebay.host.machine import check_machine
from drivebay.rpc.client import Client
from drivebay.vm.stillness import held_still, refuse_half_reverted, take_snapshots
from drivebay.vm.store import Vm
from tests.fakes.qemu_agent import FakeAgent, says
from tests.unit.vm_world import World, bare


@pytest.fixture
def vm() -> Iterator[Vm]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Vm(Path(name), bare("web"), "")


class Monitor:
    """Of a VM in the state ``status``, in whose guest the agent's port is ``opened``."""

    def __init__(self) -> None:
        self.opened = True
        self.status = "running"
        self.asked: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.asked.append("hung up")

    def call(self, command: str) -> object:
        self.asked.append(command)
        ports = [
            {"label": "console", "frontend-open": True},
            {"label": "agent", "frontend-open": self.opened},
        ]
        answers: dict[str, object] = {
            "query-chardev": ports,
            "query-status": {"status": self.status},
        }
        return answers.get(command, {})


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    fake = Monitor()
    monkeypatch.setattr("drivebay.vm.stillness.run.monitor", lambda vm: fake)
    return fake


@pytest.fixture
def agent(vm: Vm) -> Iterator[FakeAgent]:
    fake = FakeAgent(vm.agent_socket)
    fake.will("guest-fsfreeze-freeze", says(2))
    fake.will("guest-fsfreeze-thaw", says(2))
    yield fake
    fake.close()


def test_a_guest_that_listens_is_frozen_while_it_is_stopped(
    vm: Vm, monitor: Monitor, agent: FakeAgent
) -> None:
    with held_still(vm) as (has_agent, said):
        assert agent.commands() == ["guest-fsfreeze-freeze"]
        assert monitor.asked[-1] == "stop"
        assert has_agent
        assert said == "whole: the guest's agent froze 2 file systems"
    assert monitor.asked[-2:] == ["cont", "hung up"]
    assert agent.commands() == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_a_guest_that_nobody_listens_in_is_not_asked(vm: Vm, monitor: Monitor) -> None:
    monitor.opened = False
    with socket.socket(socket.AF_UNIX) as port:
        port.bind(str(vm.agent_socket))
        port.listen()
        port.setblocking(False)
        with held_still(vm) as (has_agent, said):
            assert not has_agent
            assert said.startswith("as after a power cut")
        with pytest.raises(BlockingIOError):
            port.accept()
    assert monitor.asked == ["query-chardev", "query-status", "stop", "cont", "hung up"]


def test_a_guest_that_listens_and_is_silent_is_cloned_all_the_same(
    vm: Vm, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.stillness._AGENT_SECONDS", 0.05)
    # A port that is open, and nobody who answers.
    with held_still(vm) as (has_agent, said):
        assert not has_agent
        assert said.startswith("as after a power cut")
    assert monitor.asked == ["query-chardev", "query-status", "stop", "cont", "hung up"]


def test_a_vm_that_was_paused_stays_paused(vm: Vm, monitor: Monitor) -> None:
    monitor.opened = False
    monitor.status = "paused"
    with held_still(vm):
        pass
    assert monitor.asked == ["query-chardev", "query-status", "hung up"]


def test_a_vm_that_is_half_reverted_is_refused_and_the_doctor_says_why(world: World) -> None:
    vm = world.vm("web")
    refuse_half_reverted(vm)
    vm.unfinished_revert.write_text("before")
    with pytest.raises(StateError, match="its disks may be of different moments"):
        refuse_half_reverted(vm)
    said = list(islice(check_machine(world.vms, "web", None), 2))[1]  # the rest takes long
    assert (said.level, said.subject) == ("problem", "snapshots")
    assert said.mend == "drivebay vm revert web before"


# ---- all or none --------------------------------------------------------------------------------


@pytest.fixture
def wanted(world: World) -> list[tuple[Disk, str]]:
    """Snapshots of two volumes."""
    world.pool()
    for name in ("a", "b"):
        world.volume(name)
    inventory = world.inventory()
    return [(inventory.disk(f"p/{name}"), f"{name}@now") for name in ("a", "b")]


def test_a_name_that_somebody_else_takes_meanwhile_stays_theirs(
    world: World, vm: Vm, wanted: list[tuple[Disk, str]]
) -> None:
    world.target.bdev_lvol_snapshot("p/b", "b@now")
    with pytest.raises(RpcRefused, match="File exists"):
        take_snapshots(world.client, vm, False, wanted)
    assert world.volumes() == ["p/a", "p/b", "p/b@now"]


@pytest.mark.parametrize("made", [True, False])
def test_ctrl_c_while_one_is_taken_leaves_none(
    world: World, vm: Vm, wanted: list[tuple[Disk, str]], made: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupted(client: Client, method: str, params: dict[str, str]) -> object:
        if params.get("snapshot_name") != "b@now":
            return call(client, method, params)
        if made:
            call(client, method, params)
        raise KeyboardInterrupt

    monkeypatch.setattr("drivebay.vm.stillness.call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_snapshots(world.client, vm, False, wanted)
    assert world.volumes() == ["p/a", "p/b"]
