"""vm/lifecycle.py: what is looked at before a start, and how a VM is switched off."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivebay.errors import HostError, InUse, NotFound, StateError, UsageError
from drivebay.vm import lifecycle
from drivebay.vm.hardware import Hardware
from drivebay.vm.kvm import Accelerator
from drivebay.vm.lifecycle import check_able, check_image, start, stop, write_seed
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import CloudInit, DiskSpec
from drivebay.vm.ssh import make_keys
from drivebay.vm.store import Vm
from tests.fakes.qemu_monitor import FakeMonitor
from tests.unit.iso_files import write_iso
from tests.unit.vm_folder import UUID, seem_to_run
from tests.unit.vm_world import World, bare, idle_process

ABLE = frozenset({"memfd", "vhost-user-blk"})
QEMU = Qemu(Path("/q"), (7, 2), ABLE, ("pc-q35-7.2",), "pc-q35-7.2")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def running(world: World, process: subprocess.Popen[bytes]) -> Vm:
    vm = world.vm("web")
    seem_to_run(vm, process)
    return vm


# ---- before a start -----------------------------------------------------------------------------


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that is able; nothing is started."""
    monkeypatch.setattr(lifecycle, "find_qemu", lambda named: QEMU)
    monkeypatch.setattr(lifecycle, "choose_accelerator", lambda: Accelerator("tcg", ""))

    def never(*parts: object) -> None:
        raise AssertionError("QEMU was started")

    monkeypatch.setattr("drivebay.vm.run.launch", never)


def test_one_that_runs_is_not_started(world: World, running: Vm, ready: None) -> None:
    with pytest.raises(InUse, match="VM 'web' runs already"):
        start(world.vms, "web", world.socket)


def test_two_at_once(world: World, ready: None) -> None:
    world.vm("web")
    with world.vms.locked("web"), pytest.raises(InUse, match="right now"):
        start(world.vms, "web", world.socket)


def test_a_disk_of_another_gets_no_socket(world: World, ready: None) -> None:
    world.pool()
    world.volume("x")
    world.vm("web", DiskSpec("d", "p/x"))
    world.vm("db", DiskSpec("d", "p/x"))
    with pytest.raises(InUse, match="belongs to VM 'db'"):
        start(world.vms, "web", world.socket)
    assert world.target.calls == []


def test_one_disk_twice_gets_no_socket(world: World, ready: None) -> None:
    world.pool()
    world.volume("x")
    world.vm("web", DiskSpec("d", "p/x"), DiskSpec("e", "x"))
    with pytest.raises(InUse, match="belongs to VM 'web'"):
        start(world.vms, "web", world.socket)
    assert world.target.calls == []


def test_one_that_libvirt_runs_is_not_started_beside_it(
    world: World, ready: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.disks.LETTING_GO_SECONDS", 0.0)
    world.pool()
    world.volume("x")
    world.vm("web", DiskSpec("d", "p/x"))
    world.target.show("vm.web.d", "p/x", 1)
    with pytest.raises(InUse, match="'web' is off, and yet"):
        start(world.vms, "web", world.socket)


def test_a_machine_that_this_qemu_does_not_know() -> None:
    vm = Vm(Path(), bare("web", machine="pc-q35-9.2"), "")
    with pytest.raises(UsageError, match=r"was made as a 'pc-q35-9.2', which '/q' \(QEMU 7.2\)"
                       ) as caught:  # fmt: skip
        check_able(vm, QEMU)
    assert "--machine pc-q35-7.2" in str(caught.value.hint)


def overlay_vm(image: str | None) -> Vm:
    return Vm(Path(), bare("web", DiskSpec("s", overlay="s.qcow2", made=True), image=image), "")


def test_an_image_that_was_changed_is_seen(world: World) -> None:
    image = world.image()
    volume = Vm(Path(), bare("web", DiskSpec("s", "p/x", made=True), image="debian"), "")
    for vm in (volume, overlay_vm("debian")):
        check_image(vm)
    image.path.chmod(0o644)
    with image.path.open("r+b") as file:
        file.write(b"x")
    for vm in (volume, overlay_vm("debian")):
        with pytest.raises(StateError, match="image 'debian' was changed"):
            check_image(vm)
    check_image(Vm(Path(), bare("web", DiskSpec("s", "p/x"), image="debian"), ""))
    check_image(overlay_vm(None))


def test_an_image_that_is_gone_is_missed_by_overlays_only(world: World) -> None:
    check_image(Vm(Path(), bare("web", DiskSpec("s", "p/x", made=True), image="debian"), ""))
    with pytest.raises(NotFound, match="the image 'debian' of VM 'web' is gone"):
        check_image(overlay_vm("debian"))


def test_an_iso_that_is_gone_or_none_stops_the_start(world: World, ready: None) -> None:
    world.pool()
    world.volume("x")
    world.vm("web", DiskSpec("d", "p/x"), iso="/nonexistent")
    with pytest.raises(HostError, match="can't read the ISO '/nonexistent'") as caught:
        start(world.vms, "web", world.socket)
    assert caught.value.hint == "without it: drivebay vm eject web"
    world.vm("db", iso="/dev/null")
    with pytest.raises(UsageError, match="'/dev/null' is no file") as refused:
        start(world.vms, "db", world.socket)
    assert refused.value.hint == "without it: drivebay vm eject db"
    assert world.target.calls == []


def test_without_an_iso_there_is_no_start_from_it(world: World, ready: None) -> None:
    world.vm("web")
    with pytest.raises(UsageError, match="VM 'web' has no ISO to start from") as caught:
        start(world.vms, "web", world.socket, boot_from="iso")
    assert caught.value.hint == "drivebay vm set web --iso FILE"


@pytest.mark.parametrize(("accelerator", "first"), [("tcg", "no_timer_check "), ("kvm", "")])
def test_an_installers_kernel_is_started_once_and_nothing_of_it_stays(
    world: World, ready: None, monkeypatch: pytest.MonkeyPatch, accelerator: str, first: str
) -> None:
    files = {"/casper/vmlinuz": bytes(0x202) + b"HdrS", "/casper/initrd": b"initrd"}
    vm = world.vm("web", iso=str(write_iso(world.folder / "iso", files)))
    before = {path.name for path in vm.folder.iterdir()}
    monkeypatch.setattr(lifecycle, "choose_accelerator", lambda: Accelerator(accelerator, ""))
    started: list[Hardware] = []

    def launch(vm: Vm, qemu: Qemu, how: Accelerator, hardware: Hardware, *more: object) -> None:
        assert hardware.start is not None
        assert hardware.start.initrd is not None
        assert Path(hardware.start.initrd).read_bytes() == b"initrd"
        started.append(hardware)
        raise StateError("QEMU did not start")

    monkeypatch.setattr("drivebay.vm.run.launch", launch)
    with pytest.raises(StateError, match="did not start"):
        start(world.vms, "web", world.socket, boot_from="text")
    (hardware,) = started
    assert hardware.start is not None
    assert hardware.start.append == f"{first}--- console=ttyS0,115200"
    assert hardware.ends_at_reboot
    assert world.vms.load("web") == vm
    left = {path.name for path in vm.folder.iterdir()} - before
    assert {name for name in left if name.startswith(".")} == set()


# ---- the seed -----------------------------------------------------------------------------------


def seeded(world: World, user_data: str | None = None) -> Vm:
    cloud_init = CloudInit("drivebay-1", "web", user_data=user_data)
    spec = bare("web", cloud_init=cloud_init)

    def fill(vm: Vm) -> None:
        make_keys(vm.keys, UUID)

    return world.vms.create(spec, fill)


def test_the_seed_is_written_anew_for_its_owner(world: World) -> None:
    vm = seeded(world, "mine")
    vm.seed.write_bytes(b"old")
    vm.seed.chmod(0o644)
    with pytest.raises(HostError, match=r"can't read '.*/web/mine', the user-data of VM 'web'"):
        write_seed(vm)
    (vm.folder / "mine").write_bytes(b"\xff")
    with pytest.raises(HostError, match="the user-data of VM 'web'"):
        write_seed(vm)
    assert vm.seed.read_bytes() == b"old"
    (vm.folder / "mine").write_text("#cloud-config\n")
    write_seed(vm)
    assert b"CD001" in vm.seed.read_bytes()
    assert stat.S_IMODE(vm.seed.stat().st_mode) == 0o600
    (vm.folder / ".seed.iso.new").mkdir()
    with pytest.raises(HostError, match="can't write"):
        write_seed(vm)


def test_without_cloud_init_there_is_no_seed(world: World) -> None:
    vm = world.vm("web")
    write_seed(vm)
    assert not vm.seed.exists()


# ---- switching off ------------------------------------------------------------------------------


def test_one_that_is_off(world: World) -> None:
    world.vm("web")
    assert stop(world.vms, "web") is None
    with pytest.raises(NotFound):
        stop(world.vms, "db")


def done(act: Callable[[], None]) -> dict[str, str]:
    act()
    return {}


def test_the_guest_switches_itself_off(
    world: World, running: Vm, process: subprocess.Popen[bytes]
) -> None:
    monitor = FakeMonitor(running.monitor_socket)
    monitor.answers["system_powerdown"] = lambda arguments: done(process.kill)
    assert stop(world.vms, "web", timeout_s=20) == "off"
    monitor.close()


def test_the_button_is_pressed_again(
    world: World, running: Vm, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_PRESS_EVERY_S", 0.0)
    monitor = FakeMonitor(running.monitor_socket)
    presses = iter([lambda: None, process.kill])
    monitor.answers["system_powerdown"] = lambda arguments: done(next(presses))
    assert stop(world.vms, "web", timeout_s=20) == "off"
    assert monitor.commands()[:2] == ["system_powerdown"] * 2
    monitor.close()


@pytest.mark.parametrize("why", ["force", "no time", "no monitor", "deaf guest"])
def test_what_does_not_end_is_ended(
    world: World, running: Vm, process: subprocess.Popen[bytes], why: str
) -> None:
    monitor = FakeMonitor(running.monitor_socket)
    if why == "no monitor":
        running.monitor_socket.unlink()
    limit = {"no time": 0.0, "deaf guest": 0.05}.get(why, 20.0)
    assert stop(world.vms, "web", force=why == "force", timeout_s=limit) == "by force"
    assert process.wait(20) == -15
    pressed = ["system_powerdown"] if why == "deaf guest" else []
    assert monitor.commands() == pressed
    monitor.close()
