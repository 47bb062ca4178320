"""VMs of the tiny image, which boot in seconds: many at once, both firmwares, a console, an
overlay, and what Debian's own QEMU cannot do with a newer one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pexpect
import pytest

from drivebay.vm.guest_image import GuestImage
from drivebay.vm.images.tiny import UP
from tests.e2e.newer_qemu import system_emulator
from tests.e2e.vm_bay import VmBay, tiny_kernel

pytestmark = pytest.mark.needs_qemu

MANY = 16
SMALL = ("--image", "tiny", "--memory", "96M", "--cpus", "1")
BOOT_SECONDS = "600"


@pytest.fixture(scope="module", autouse=True)
def tiny(vm_bay: VmBay) -> None:
    vm_bay.start_target()
    vm_bay.ok("image", "build", "tiny")


@pytest.fixture(autouse=True)
def nothing_left(vm_bay: VmBay) -> Iterator[None]:
    yield
    for entry in vm_bay.json("vm", "list"):
        vm_bay.vm("delete", entry["name"], "--force", "--yes")
    assert vm_bay.disks() == []
    assert vm_bay.controllers() == []


def wait_up(vm_bay: VmBay, *names: str) -> None:
    for name in names:
        vm_bay.vm("wait", name, "--for", "console", UP, "--timeout", BOOT_SECONDS)


def open_console() -> pexpect.spawn[str]:
    """The console of VM 't', at its prompt."""
    console = pexpect.spawn(
        sys.executable, ["-m", "drivebay", "vm", "console", "t"], encoding="utf-8", timeout=60
    )
    console.expect("tiny#")
    return console


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_it_boots_from_a_disk_of_ours_and_its_power_button_works(
    vm_bay: VmBay, firmware: str
) -> None:
    memory = "384M" if firmware == "uefi" else "96M"  # GRUB needs more beside UEFI
    vm_bay.vm("create", "t", *SMALL[:2], "--memory", memory, "--firmware", firmware, "--start")
    wait_up(vm_bay, "t")
    assert vm_bay.vm("stop", "t") == "VM 't' is off\n"


def test_an_overlay_is_served_by_qemu_and_its_image_stays(vm_bay: VmBay) -> None:
    vm_bay.vm("create", "t", *SMALL, "--overlay", "--disk", "256M", "--start")
    wait_up(vm_bay, "t")
    assert vm_bay.disks() == []
    assert "VM 't'" in vm_bay.refused("image", "delete", "tiny", "--yes")
    image = vm_bay.json("image", "info", "tiny")
    vm_bay.vm("stop", "t")
    vm_bay.ok("image", "check", "tiny")
    assert "stop t first" not in vm_bay.vm("clone", "t", "u")
    assert vm_bay.info("u")["disks"][0]["overlay"] == "system.qcow2"
    assert image["name"] == "tiny"


def test_an_image_with_clones_stays_and_a_changed_one_is_noticed(vm_bay: VmBay) -> None:
    vm_bay.vm("create", "t", *SMALL)
    said = vm_bay.refused("image", "delete", "tiny", "--yes")
    assert "disk 'default/t-system'" in said
    raw = vm_bay.folder / "data/drivebay/images/tiny/image.raw"
    before = raw.stat()
    raw.touch()
    said = vm_bay.refused("vm", "start", "t")
    assert "image 'tiny' was changed since it was added" in said
    assert vm_bay.info("t")["state"] == "off"
    vm_bay.ok("image", "check", "tiny")  # only its time was
    vm_bay.vm("start", "t")
    assert before.st_size == raw.stat().st_size


def test_sixteen_at_once_share_a_pool_and_differ(vm_bay: VmBay, guest_image: GuestImage) -> None:
    """They start their kernel directly, which spares sixteen firmwares an emulated processor."""
    boot = tiny_kernel(vm_bay.folder, guest_image)
    vm_bay.vm("create", "t", "--disk", "64M", "--memory", "96M", "--cpus", "1", *boot)
    vm_bay.vm("clone", "t", "n", "--count", str(MANY - 1))
    names = ["t", *(f"n-{number + 1}" for number in range(MANY - 1))]
    for name in names:
        vm_bay.vm("start", name)
    for name in names:
        vm_bay.vm("wait", name, "--for", "console", "guest#", "--timeout", BOOT_SECONDS)
    shown = vm_bay.json("vm", "list")
    assert [entry["state"] for entry in shown] == ["running"] * MANY
    assert len({entry["nets"][0]["mac"] for entry in shown}) == MANY
    assert len({str(entry["nets"][0]["forward"]) for entry in shown}) == MANY
    sessions = {entry["name"]: entry["sessions"]
                for entry in vm_bay.json("target", "status")["controllers"]}  # fmt: skip
    assert sessions == {f"vm.{name}.system": 1 for name in names}
    assert {disk["pool"] for disk in vm_bay.json("disk", "list")} == {"default"}


def test_the_console_is_typed_at_and_left_with_ctrl_bracket(vm_bay: VmBay) -> None:
    vm_bay.vm("create", "t", *SMALL, "--start")
    wait_up(vm_bay, "t")
    for number in range(2):  # it can be left and entered again
        console = open_console()
        console.sendline(f"echo $(({number} + 40))x; hostname")
        console.expect(f"{number + 40}x")
        console.expect("tiny")
        console.send("\x1d")
        console.expect(pexpect.EOF)
        console.close()
        assert console.exitstatus == 0
    log = vm_bay.vm("log", "t")
    assert UP in log
    assert "41x" in log, "what was typed at the console is in its log, too"


def test_what_was_synced_is_there_after_qemu_was_killed(vm_bay: VmBay) -> None:
    vm_bay.vm("create", "t", *SMALL, "--start")
    wait_up(vm_bay, "t")
    console = open_console()
    console.sendline("echo synced > /root/kept; sync; echo do''ne")
    console.expect("done")
    os.kill(vm_bay.pid("t"), signal.SIGKILL)
    console.expect(pexpect.EOF)
    while vm_bay.info("t")["state"] == "running":
        time.sleep(0.05)
    vm_bay.vm("start", "t")
    wait_up(vm_bay, "t")
    console = open_console()
    console.sendline("cat /root/kept; echo do''ne")
    console.expect("synced")
    console.close(force=True)


@pytest.mark.parametrize("bus", ["nvme", "scsi"])
def test_a_newer_qemu_boots_from_other_buses(vm_bay: VmBay, bus: str) -> None:
    qemu = str(system_emulator())
    vm_bay.vm("create", "t", *SMALL, "--bus", bus, "--qemu", qemu, "--start")
    wait_up(vm_bay, "t")
    vm_bay.vm("attach", "t", "--disk", "32M")
    console = open_console()
    time.sleep(1)
    console.sendline("cat /proc/partitions; echo do''ne")
    console.expect("nvme1n1|sdb")
    console.expect("done")
    console.close(force=True)
    vm_bay.vm("detach", "t", "disk1")
    vm_bay.ok("disk", "delete", "t-disk1", "--yes")


def test_a_newer_qemu_starts_from_sata(vm_bay: VmBay) -> None:
    """Debian's cloud kernel has no driver for it: firmware and GRUB read the disk, and no more."""
    qemu = str(system_emulator())
    vm_bay.vm("create", "t", *SMALL, "--bus", "sata", "--qemu", qemu, "--start")
    vm_bay.vm(
        "wait", "t", "--for", "console", "no disk has the root file system", "--timeout",
        BOOT_SECONDS,
    )  # fmt: skip


def test_two_qemus_run_side_by_side(vm_bay: VmBay) -> None:
    vm_bay.vm("create", "old", *SMALL, "--start")
    vm_bay.vm("create", "new", *SMALL, "--qemu", str(system_emulator()), "--start")
    wait_up(vm_bay, "old", "new")
    assert vm_bay.info("old")["machine"] != vm_bay.info("new")["machine"]
    for name in ("old", "new"):
        assert vm_bay.vm("stop", name) == f"VM '{name}' is off\n"
    # The other way round it is another machine, which the older one does not know.
    vm_bay.vm("set", "new", "--qemu", "qemu-system-x86_64")
    done = vm_bay.run("vm", "start", "new")
    assert done.code == 2
    assert "does not know" in done.err
