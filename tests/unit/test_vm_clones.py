"""vm/clones.py: clones of VMs that are off or run; the target, the monitor and the agent are
stand-ins, so that each can fail.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks.connection import RpcRefused
from drivebay.errors import AlreadyExists, DrivebayError, HostError, StateError, UsageError
from drivebay.net.members import keep, read_members
from drivebay.net.model import Network
from drivebay.net.store import Networks
from drivebay.vm import agent as agent_module
from drivebay.vm import renewal
from drivebay.vm.clones import Clones, plan_clones
from drivebay.vm.qmp import QmpRefused
from drivebay.vm.spec import CloudInit, DiskSpec, Forward, NetSpec
from drivebay.vm.store import Vm
from tests.fakes.qemu_agent import FakeAgent, refuses, says, silent
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import MIB, World, idle_process

TWO = (DiskSpec("system", "p/web-system", made=True), DiskSpec("data", "p/web-data", made=True))


@pytest.fixture
def vm(world: World) -> Vm:
    """A VM with two disks, which is off."""
    world.pool()
    world.volume("web-system")
    world.volume("web-data")
    return world.vm("web", *TWO)


def plan(world: World, vm: Vm, *names: str) -> Clones:
    return plan_clones(world.vms, vm, names or ("copy",), world.client, world.inventory())


def snapshots(world: World) -> list[str]:
    return [name for _, name in world.target.volumes if "@" in name]


def untouched(world: World) -> None:
    assert world.volumes() == ["p/web-data", "p/web-system"]
    assert all(volume.parent is None for volume in world.target.volumes.values())
    assert world.vms.names() == ["web"]
    assert world.target.controllers == []
    assert [each.name for each in world.vms.folder.iterdir() if each.name.startswith(".new")] == []


# ---- in networks --------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_a_clone_has_a_place_of_its_own_in_a_network(world: World) -> None:
    subnet = IPv4Network("192.168.77.0/24")
    Networks().create(Network("lan", "nat", "db-lan", subnet, made=True))
    nets = (
        NetSpec("network", "52:54:00:aa:00:01", network="lan", address="192.168.77.9/24",
                gateway="192.168.77.1", dns=("192.168.77.1",), model="e1000"),
        NetSpec("user", "52:54:00:aa:00:02", address="10.0.2.50/24", gateway="10.0.2.2"),
    )  # fmt: skip
    vm = world.vm("web", nets=nets)
    keep(Networks(), "lan", "web", 0, nets[0].mac, IPv4Address("192.168.77.9"))
    plan(world, vm).plan.run()
    copied = world.vms.load("copy").spec.nets
    assert [(net.address, net.gateway, net.dns) for net in copied] == [
        ("dhcp", None, ()), ("10.0.2.50/24", "10.0.2.2", ()),
    ]  # fmt: skip
    assert (copied[0].network, copied[0].model) == ("lan", "e1000")
    members = {member.vm: member for member in read_members(Networks(), "lan")}
    assert members["copy"].mac == copied[0].mac != nets[0].mac
    assert members["copy"].address not in (None, members["web"].address)


# ---- of a VM that is off ------------------------------------------------------------------------


def test_each_disk_goes_on_from_a_snapshot(world: World, vm: Vm) -> None:
    clones = plan(world, vm)
    clones.plan.run()
    assert world.target.names() == [
        *["bdev_lvol_snapshot"] * 2,
        *["bdev_lvol_clone"] * 2,
        *["vhost_create_blk_controller"] * 2,
    ]
    marks = {name.partition("@")[2] for name in snapshots(world)}
    assert len(marks) == 1, "one moment, one mark"
    copy = world.vms.load("copy")
    assert copy.spec.disks == (
        DiskSpec("system", "p/copy-system", made=True),
        DiskSpec("data", "p/copy-data", made=True),
    )
    for disk in ("system", "data"):
        clone = world.target.volumes["p", f"copy-{disk}"]
        assert clone.parent == world.target.volumes["p", f"web-{disk}"].parent
    assert copy.spec.uuid != vm.spec.uuid
    assert copy.keys.is_dir()
    assert clones.consistency == ""


def test_several_have_one_snapshot_and_names_addresses_and_ports_of_their_own(
    world: World,
) -> None:
    world.pool()
    world.volume("web-system")
    forward = (Forward(2222, 22), Forward(8080, 80))
    nets = (
        NetSpec("user", "52:54:00:00:00:01", forward),
        NetSpec("user", "52:54:00:00:00:02", (Forward(2223, 22),)),
        NetSpec("user", "52:54:00:00:00:03", (Forward(2224, 80),)),
    )
    cloud_init = CloudInit("drivebay-1", "web")
    vm = world.vm("web", TWO[0], nets=nets, cloud_init=cloud_init)
    clones = plan(world, vm, "a", "b")
    clones.plan.run()
    assert len(snapshots(world)) == 1
    assert clones.volumes == ["p/a-system", "p/b-system"]
    specs = [world.vms.load(name).spec for name in ("web", "a", "b")]
    assert specs[1:] == clones.specs
    macs = [net.mac for spec in specs for net in spec.nets]
    ports = [forward.host_port for spec in specs for net in spec.nets for forward in net.forward]
    assert len(set(macs)) == len(macs) == 9
    assert len(set(ports)) == len(ports) == 8
    assert [forward.guest_port for forward in specs[1].nets[0].forward] == [22]
    assert specs[1].nets[2].forward == ()
    instances = {spec.cloud_init.instance_id for spec in specs if spec.cloud_init is not None}
    assert len(instances) == 3


def test_what_is_shared_stays_the_originals(world: World) -> None:
    world.pool()
    world.volume("x")
    vm = world.vm("web", DiskSpec("d", "p/x", made=True, shared=True))
    clones = plan(world, vm)
    assert clones.volumes == []
    clones.plan.run()
    assert snapshots(world) == []
    assert world.vms.load("copy").spec.disks == (DiskSpec("d", "p/x", shared=True),)


def test_a_disk_that_was_not_made_for_the_original_is_for_the_clone(world: World) -> None:
    world.pool()
    world.volume("x")
    plan(world, world.vm("web", DiskSpec("d", "p/x"))).plan.run()
    assert world.vms.load("copy").spec.disks == (DiskSpec("d", "p/copy-d", made=True),)


@pytest.mark.parametrize("letter", ["x", "ä"])
def test_a_long_name_is_cut_for_its_snapshot(world: World, letter: str) -> None:
    world.pool()
    long = letter * (62 // len(letter.encode()))
    world.volume(long)
    plan(world, world.vm("web", DiskSpec("d", f"p/{long}"))).plan.run()
    (snapshot,) = snapshots(world)
    assert 62 <= len(snapshot.encode()) <= 63
    assert snapshot.startswith(letter * 20)


def test_names_that_are_taken(world: World, vm: Vm) -> None:
    with pytest.raises(AlreadyExists, match="a VM 'web' already"):
        plan(world, vm, "new", "web")
    with pytest.raises(UsageError, match="can't be the name of a VM"):
        plan(world, vm, "a b")
    world.volume("copy-data")
    with pytest.raises(AlreadyExists, match="a disk 'copy-data' in pool 'p' already"):
        plan(world, vm)
    assert world.target.calls == []


def test_a_disk_in_no_pool(world: World) -> None:
    world.pool()
    file = world.folder / "file"
    file.write_bytes(bytes(4096))
    world.target.bdev_aio_create("plain", str(file))
    with pytest.raises(StateError, match="'plain', which lies in no pool") as caught:
        plan(world, world.vm("web", DiskSpec("d", "plain")))
    assert caught.value.hint == "drivebay vm detach web d"


@pytest.mark.parametrize(
    ("failing", "successes"),
    [
        ("bdev_lvol_snapshot", 0),
        ("bdev_lvol_snapshot", 1),
        *(("bdev_lvol_clone", number) for number in range(4)),
        *(("vhost_create_blk_controller", number) for number in range(4)),
    ],
)
def test_whatever_fails_nothing_is_left(world: World, vm: Vm, failing: str, successes: int) -> None:
    world.target.failing_after = {failing: successes}
    clones = plan(world, vm, "a", "b")
    with pytest.raises(RpcRefused, match=failing):
        clones.plan.run()
    assert clones.plan.left == []
    untouched(world)


def test_a_folder_that_cannot_be_made_leaves_no_disk(
    world: World, vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    clones = plan(world, vm)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StateError, match="no ssh-keygen"):
        clones.plan.run()
    untouched(world)


# ---- files --------------------------------------------------------------------------------------


def with_files(world: World) -> Vm:
    overlay = DiskSpec("system", overlay="system.qcow2", made=True)
    cloud_init = CloudInit("drivebay-1", "web", user_data="mine")
    vm = world.vm("web", overlay, firmware="uefi", memory=512 * MIB, cloud_init=cloud_init)
    for name in ("system.qcow2", "mine", "vars.fd"):
        (vm.folder / name).write_text(f"{name} of web")
        (vm.folder / name).chmod(0o600)
    return vm


def test_files_are_copied(world: World) -> None:
    clones = plan(world, with_files(world))
    clones.plan.run()
    copy = world.vms.load("copy")
    assert copy.spec.disks == (DiskSpec("system", overlay="system.qcow2", made=True),)
    for name in ("system.qcow2", "mine", "vars.fd"):
        assert (copy.folder / name).read_text() == f"{name} of web"
        assert (copy.folder / name).stat().st_mode & 0o777 == 0o600
    assert world.target.calls == []


def test_a_clone_has_no_cd(world: World) -> None:
    world.vm("web", iso="/srv/debian.iso")
    plan(world, world.vms.load("web")).plan.run()
    assert world.vms.load("copy").spec.iso is None


def test_a_file_that_cannot_be_copied_leaves_nothing(world: World) -> None:
    vm = with_files(world)
    (vm.folder / "mine").unlink()
    with pytest.raises(HostError, match=r"can't copy '.*/web/mine': .*No such file"):
        plan(world, vm).plan.run()
    assert world.vms.names() == ["web"]


# ---- of a VM that runs --------------------------------------------------------------------------


Log = list[str]


@pytest.fixture
def log() -> Log:
    """What happened, in order: at the agent, the monitor and the target."""
    return []


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def monitor(
    world: World, vm: Vm, log: Log, process: subprocess.Popen[bytes]
) -> Iterator[FakeMonitor]:
    """The VM seems to run; its monitor and the target tell the log what they are asked."""
    seem_to_run(vm, process)
    fake = FakeMonitor(vm.monitor_socket)

    def heard(command: str) -> Callable[[dict[str, Any]], Any]:
        def tell(arguments: dict[str, Any]) -> dict[str, Any]:
            log.append(command)
            return {}

        return tell

    for command in ("stop", "cont"):
        fake.answers[command] = heard(command)
    fake.answers["query-chardev"] = [{"label": "agent", "frontend-open": False}]
    original = world.target.bdev_lvol_snapshot

    def snapshot(lvol_name: str, snapshot_name: str) -> str:
        log.append(f"snapshot {lvol_name}")
        return original(lvol_name, snapshot_name)

    world.target.bdev_lvol_snapshot = snapshot  # type: ignore[method-assign]
    yield fake
    fake.close()


@pytest.fixture
def guest(vm: Vm, monitor: FakeMonitor, log: Log) -> Iterator[FakeAgent]:
    """An agent that freezes three file systems."""
    monitor.answers["query-chardev"] = [{"label": "agent", "frontend-open": True}]
    fake = FakeAgent(vm.agent_socket)
    for word in ("freeze", "thaw"):
        fake.will(f"guest-fsfreeze-{word}", logged(log, word))
    yield fake
    fake.close()


def logged(log: Log, word: str) -> Callable[[dict[str, Any]], bytes | None]:
    def tell(heard: dict[str, Any]) -> bytes | None:
        log.append(word)
        return says(3)(heard)

    return tell


SNAPSHOTS = ["snapshot p/web-system", "snapshot p/web-data"]


def test_all_disks_are_of_one_instant(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log
) -> None:
    clones = plan(world, vm)
    assert "freeze VM 'web' for a moment" in clones.plan.texts[0]
    clones.plan.run()
    assert log == ["freeze", "stop", *SNAPSHOTS, "cont", "thaw"]
    assert clones.consistency == "whole: the guest's agent froze 3 file systems"
    assert renewal.is_pending(world.vms.load("copy")), "the agent gives it its identity"


def test_without_an_agent_they_are_as_after_a_power_cut(
    world: World, vm: Vm, monitor: FakeMonitor, log: Log
) -> None:
    clones = plan(world, vm)
    clones.plan.run()
    assert log == ["stop", *SNAPSHOTS, "cont"]
    assert clones.consistency.startswith("as after a power cut: the guest has no agent")
    assert not renewal.is_pending(world.vms.load("copy"))


def test_an_agent_that_hangs_is_not_waited_for(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("drivebay.vm.stillness._AGENT_SECONDS", 0.05)
    guest.will("guest-sync-delimited", silent)
    clones = plan(world, vm)
    clones.plan.run()
    assert log == ["stop", *SNAPSHOTS, "cont"]
    assert clones.consistency.startswith("as after a power cut: ")


def test_an_agent_that_hangs_while_it_freezes_is_thawed(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(agent_module, "FREEZE_SECONDS", 0.05)
    guest.will("guest-fsfreeze-freeze", silent)
    clones = plan(world, vm)
    clones.plan.run()
    assert log == ["thaw", "stop", *SNAPSHOTS, "cont"]
    assert "the guest's agent froze nothing" in clones.consistency


def test_an_agent_that_refuses_says_why(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log
) -> None:
    guest.will("guest-fsfreeze-freeze", refuses("disabled by an administrator"))
    clones = plan(world, vm)
    clones.plan.run()
    assert "disabled by an administrator" in clones.consistency
    assert log[-3:] == [*SNAPSHOTS, "cont"]


@pytest.mark.parametrize("successes", [0, 1])
def test_a_snapshot_that_fails_still_goes_on_and_thaws(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log, successes: int
) -> None:
    world.target.failing_after = {"bdev_lvol_snapshot": successes}
    with pytest.raises(RpcRefused, match="bdev_lvol_snapshot"):
        plan(world, vm).plan.run()
    assert log == ["freeze", "stop", *SNAPSHOTS[:successes], "cont", "thaw"]
    untouched(world)


def test_a_machine_that_does_not_stop_is_thawed(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log
) -> None:
    monitor.answers["stop"] = Refuses("not now")
    with pytest.raises(QmpRefused, match="'stop': not now"):
        plan(world, vm).plan.run()
    assert log == ["freeze", "cont", "thaw"]
    untouched(world)


def test_a_machine_that_does_not_go_on_has_no_clones(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log
) -> None:
    monitor.answers["cont"] = Refuses("not now")
    with pytest.raises(QmpRefused, match="'cont': not now"):
        plan(world, vm).plan.run()
    assert log == ["freeze", "stop", *SNAPSHOTS, "thaw"]
    untouched(world)


def test_a_guest_that_stays_frozen_is_told_of(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent, log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(agent_module, "FREEZE_SECONDS", 0.2)
    guest.will("guest-fsfreeze-thaw", silent)
    with pytest.raises(DrivebayError, match="may have stayed frozen") as caught:
        plan(world, vm).plan.run()
    assert "fsfreeze --unfreeze" in str(caught.value.hint)
    assert log == ["freeze", "stop", *SNAPSHOTS, "cont"]
    untouched(world)


def test_a_machine_that_stood_still_stands_still_after(
    world: World, vm: Vm, monitor: FakeMonitor, log: Log
) -> None:
    monitor.answers["query-status"] = {"status": "paused"}
    plan(world, vm).plan.run()
    assert log == SNAPSHOTS


def test_a_monitor_that_is_not_there(
    world: World, vm: Vm, process: subprocess.Popen[bytes]
) -> None:
    seem_to_run(vm, process)
    with pytest.raises(StateError, match="the monitor of VM 'web' does not answer"):
        plan(world, vm).plan.run()
    untouched(world)


def test_an_overlay_that_qemu_writes_is_not_copied(
    world: World, process: subprocess.Popen[bytes]
) -> None:
    vm = with_files(world)
    seem_to_run(vm, process)
    with pytest.raises(StateError, match="runs on an overlay") as caught:
        plan(world, vm)
    assert caught.value.hint == "drivebay vm stop web first"


def test_a_clone_of_one_that_is_not_itself_yet_waits_too(world: World, vm: Vm) -> None:
    renewal.mark(vm.folder)
    plan(world, vm).plan.run()
    assert renewal.is_pending(world.vms.load("copy"))


def test_with_cloud_init_nobody_has_to_wait(
    world: World, vm: Vm, monitor: FakeMonitor, guest: FakeAgent
) -> None:
    spec = replace(vm.spec, cloud_init=CloudInit("drivebay-1", "web"))
    plan(world, Vm(vm.folder, spec, vm.text)).plan.run()
    assert not renewal.is_pending(world.vms.load("copy"))


def test_paths_are_in_the_clones_folder(world: World, vm: Vm) -> None:
    plan(world, vm).plan.run()
    assert Path(world.vms.load("copy").folder) == world.vms.folder / "copy"
