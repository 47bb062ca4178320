"""VMs that are installed from an ISO: what is on it starts on an empty disk, and not on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.vm.guest_image import GuestImage
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
