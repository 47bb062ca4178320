"""VMs that are installed from an ISO: what is on it starts on an empty disk, and not on another."""

from __future__ import annotations

import sys
from pathlib import Path

import pexpect
import pytest

from drivebay.vm.guest_image import GuestImage
from drivebay.vm.images.tiny import UP
from tests.e2e.tiny_installer import DONE, MENU, WRITES, make_menu, write_installer
from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = "600"


@pytest.fixture(scope="module", autouse=True)
def target(vm_bay: VmBay) -> None:
    vm_bay.start_target()


@pytest.fixture(scope="module")
def menu_iso(vm_bay: VmBay, guest_image: GuestImage) -> Path:
    """It installs GRUB and nothing else."""
    raw, iso = vm_bay.folder / "menu.raw", vm_bay.folder / "menu.iso"
    make_menu(raw)
    write_installer(iso, guest_image, raw)
    return iso


def wait(vm_bay: VmBay, text: str) -> None:
    vm_bay.vm("wait", "t", "--for", "console", text, "--timeout", BOOT_SECONDS)


def said(vm_bay: VmBay, text: str) -> int:
    """How often the guest has said it since its start."""
    return (vm_bay.vm_folder("t") / "console.log").read_bytes().count(text.encode())


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_an_empty_disk_is_installed_to_and_an_installed_one_starts(
    vm_bay: VmBay, menu_iso: Path, firmware: str
) -> None:
    """The CD stays in its drive: the same machine, reset, finds a system on its disk."""
    words = ("--memory", "384M", "--cpus", "1", "--firmware", firmware, "--disk", "64M")
    vm_bay.vm("create", "t", "--iso", str(menu_iso), *words, "--start")
    wait(vm_bay, DONE)
    wait(vm_bay, MENU)
    assert said(vm_bay, WRITES) == 1
    if firmware == "bios":
        vm_bay.vm("restart", "t", "--force", "--boot", "iso")
        wait(vm_bay, DONE)
        wait(vm_bay, MENU)  # it was started from the CD once, and its reset is another start
        assert said(vm_bay, WRITES) == 1
    vm_bay.vm("eject", "t")
    assert (vm_bay.info("t")["iso"], vm_bay.info("t")["pending"]) == (None, [])
    vm_bay.vm("delete", "t", "--force", "--yes")


def test_an_installer_is_text_on_the_console_and_what_it_installed_starts(
    vm_bay: VmBay, guest_image: GuestImage
) -> None:
    vm_bay.ok("image", "build", "tiny")
    iso = vm_bay.folder / "tiny.iso"
    write_installer(iso, guest_image, vm_bay.folder / "data/drivebay/images/tiny/image.raw")
    words = ["create", "t", "--iso", str(iso), "--memory", "256M", "--cpus", "1", "--text"]
    console = pexpect.spawn(
        sys.executable, ["-m", "drivebay", "vm", *words], encoding="utf-8", timeout=600
    )
    console.expect_exact(WRITES)
    console.expect_exact(DONE)
    console.expect_exact("if it is installed: drivebay vm start t")  # a reboot is the end
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
    assert vm_bay.info("t")["state"] == "off"
    vm_bay.vm("start", "t")
    wait(vm_bay, UP)
    vm_bay.vm("eject", "t")
    vm_bay.vm("delete", "t", "--force", "--yes")
