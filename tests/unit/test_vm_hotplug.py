"""vm/hotplug.py: a disk added to a running machine or not at all; the monitor is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import NotFound, StateError
from drivebay.vm import hotplug
from drivebay.vm.hardware import Disk
from drivebay.vm.hotplug import plug, unplug
from drivebay.vm.qemu import Qemu
from drivebay.vm.qmp import QmpRefused
from drivebay.vm.store import Vm
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.vm_world import World

QEMU = Qemu(Path("/q"), (9, 2), frozenset({"vhost-user-block-driver"}))


def port(name: str, *behind: str) -> dict[str, Any]:
    return {"qdev_id": name, "pci_bridge": {"devices": [{"qdev_id": each} for each in behind]}}


@pytest.fixture
def vm(world: World) -> Vm:
    return world.vm("web")


@pytest.fixture
def monitor(vm: Vm) -> Iterator[FakeMonitor]:
    fake = FakeMonitor(vm.monitor_socket)
    fake.answers["query-pci"] = [
        {
            "devices": [
                {"qdev_id": ""},
                {"qdev_id": "scsi"},
                port("other"),
                port("port0", "disk-system"),
                port("port1"),
                port("port2"),
            ]
        }
    ]
    yield fake
    fake.close()


def test_a_disk_gets_the_first_free_port(vm: Vm, monitor: FakeMonitor) -> None:
    plug(vm, QEMU, Disk(Path("/run/s"), 2, name="d"))
    assert monitor.heard[1:] == [
        ("query-pci", {}),
        (
            "chardev-add",
            {
                "id": "vhost-d",
                "backend": {
                    "type": "socket",
                    "data": {
                        "addr": {"type": "unix", "data": {"path": "/run/s"}},
                        "server": False,
                        "reconnect-ms": 1000,
                    },
                },
            },
        ),
        (
            "device_add",
            {"driver": "vhost-user-blk-pci", "id": "disk-d", "bus": "port1", "chardev": "vhost-d",
             "disable-legacy": "on", "num-queues": 2},
        ),
    ]  # fmt: skip


def test_an_emulated_disk_is_a_block_node_and_a_device(vm: Vm, monitor: FakeMonitor) -> None:
    plug(vm, QEMU, Disk(Path("/run/s"), name="d", bus="scsi"))
    assert monitor.commands() == ["blockdev-add", "device_add"]
    assert monitor.heard[-1][1]["bus"] == "scsi.0"


@pytest.mark.parametrize(
    ("bus", "undone"), [("virtio", "chardev-remove"), ("nvme", "blockdev-del")]
)
def test_a_device_that_is_refused_leaves_nothing(
    vm: Vm, monitor: FakeMonitor, bus: str, undone: str
) -> None:
    monitor.answers["device_add"] = Refuses("no such bus")
    with pytest.raises(QmpRefused, match="no such bus"):
        plug(vm, QEMU, Disk(Path("/run/s"), name="d", bus=bus))
    name = {"id": "vhost-d"} if bus == "virtio" else {"node-name": "node-d"}
    assert monitor.heard[-1] == (undone, name)


def test_a_chardev_that_is_refused_needs_no_undoing(vm: Vm, monitor: FakeMonitor) -> None:
    monitor.answers["chardev-add"] = Refuses("it is there")
    with pytest.raises(QmpRefused, match="it is there"):
        plug(vm, QEMU, Disk(Path("/run/s"), name="d"))
    assert monitor.commands() == ["query-pci", "chardev-add"]


def test_no_port_is_free(vm: Vm, monitor: FakeMonitor) -> None:
    monitor.answers["query-pci"] = [{"devices": [port("port0", "disk-system")]}]
    with pytest.raises(StateError, match="no free port for another disk") as caught:
        plug(vm, QEMU, Disk(Path("/run/s"), name="d"))
    assert "drivebay vm restart web" in str(caught.value.hint)
    assert monitor.commands() == ["query-pci"]


def test_what_cannot_be_added_is_said_before_anything_is(vm: Vm, monitor: FakeMonitor) -> None:
    with pytest.raises(StateError, match="no SATA disk to a running machine"):
        plug(vm, QEMU, Disk(Path("/run/s"), name="d", bus="sata"))
    with pytest.raises(NotFound, match="on the bus 'scsi' needs the block driver"):
        plug(vm, Qemu(Path("/q"), (9, 2)), Disk(Path("/run/s"), name="d", bus="scsi"))
    assert monitor.commands() == []


def deleted(*devices: str) -> list[dict[str, Any]]:
    return [{"event": "DEVICE_DELETED", "data": {"device": each}} for each in devices]


@pytest.mark.parametrize(
    ("bus", "then"),
    [
        ("virtio", ("chardev-remove", {"id": "vhost-d"})),
        ("nvme", ("blockdev-del", {"node-name": "node-d"})),
        ("scsi", ("blockdev-del", {"node-name": "node-d"})),
    ],
)
def test_a_disk_that_the_guest_lets_go(
    vm: Vm, monitor: FakeMonitor, bus: str, then: tuple[str, dict[str, str]]
) -> None:
    monitor.events["device_del"] = deleted("disk-d")
    unplug(vm, "d", bus)
    assert monitor.heard[1:] == [("device_del", {"id": "disk-d"}), then]


def test_a_disk_that_the_guest_keeps(
    vm: Vm, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "LETTING_GO_SECONDS", 0.1)
    monitor.events["device_del"] = deleted("disk-e")  # another one
    with pytest.raises(StateError, match="'web' did not let go of disk 'd' within 0 s") as caught:
        unplug(vm, "d", "virtio")
    assert "unmount it there" in str(caught.value.hint)
    assert monitor.commands() == ["device_del"]
