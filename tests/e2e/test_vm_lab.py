"""The examples of labs with real guests: up, up again, changed, down, deleted; and killed.

Guests finish their start where their stop or their disks are looked at, and nowhere else: under
emulation that is most of a test's time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from drivebay.vm.images.tiny import UP
from drivebay.vm.store import Vms
from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
BOOT_SECONDS = "600"


@pytest.fixture(scope="module", autouse=True)
def target(vm_bay: VmBay) -> None:
    """No image: the first 'up' builds it."""
    vm_bay.start_target()


@pytest.fixture(autouse=True)
def nothing_left(vm_bay: VmBay) -> Iterator[None]:
    yield
    folder = vm_bay.folder / "labs"
    for name in vm_bay.folder.glob("data/drivebay/labs/[!.]*.json"):
        vm_bay.run("down", name.stem, "--delete", "--yes")
    left = sorted(path.name for path in folder.iterdir() if path.suffix != ".toml")
    pools = [pool for pool in vm_bay.ok("pool", "list", "-q").split() if pool != "default"]
    found = (Vms().names(), vm_bay.disks(), vm_bay.controllers(), pools, left)
    shutil.rmtree(folder)
    assert found == ([], [], [], [], []), found


def example(vm_bay: VmBay, name: str) -> Path:
    """A copy in a folder of its own, since a lab's files lie beside it."""
    folder = vm_bay.folder / "labs"
    folder.mkdir(mode=0o711, exist_ok=True)
    return Path(shutil.copy(EXAMPLES / name, folder))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert re.search(old, text), (old, text)
    file.write_text(re.sub(old, new, text))


def states(vm_bay: VmBay) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in vm_bay.json("vm", "list")}


def wait_up(vm_bay: VmBay, *names: str) -> None:
    for name in names:
        vm_bay.vm("wait", name, "--for", "console", UP, "--timeout", BOOT_SECONDS)


def test_one_vm(vm_bay: VmBay) -> None:
    file = example(vm_bay, "one-vm.toml")
    said = vm_bay.ok("up", str(file))
    assert "build the image 'tiny'" in said
    assert states(vm_bay) == {"one-vm-web": "running"}
    wait_up(vm_bay, "one-vm-web")
    assert "nothing to do" in vm_bay.ok("up", str(file))
    # An edited file: a disk more, which the running guest sees; more memory, which waits.
    edit(file, r"\[vm.web\]", '[disk.data]\nsize = "64M"\n\n[vm.web]\ndisks = ["data"]')
    edit(file, '"128M"', '"160M"')
    edit(file, '"1G"', '"2G"')
    said = vm_bay.ok("up", str(file))
    assert "waits for a restart: memory" in said
    shell = console("one-vm-web")
    shell.sendline("sleep 1; cat /sys/block/vd*/serial /sys/block/vda/size; echo do''ne")
    shell.expect("data")
    shell.expect(str((2 << 30) // 512))
    shell.expect("done")
    shell.close(force=True)
    assert vm_bay.ok("down", str(file)) == "VM 'one-vm-web' is off\n"
    assert states(vm_bay) == {"one-vm-web": "off"}
    assert "start VM one-vm-web" in vm_bay.ok("up", str(file))
    assert vm_bay.info("one-vm-web")["memory"] == 160 << 20
    vm_bay.ok("down", str(file), "--force")
    assert "one-vm-web" in vm_bay.refused("down", str(file), "--delete")  # nobody can be asked
    vm_bay.ok("down", str(file), "--delete", "--yes")


def test_four_vms(vm_bay: VmBay) -> None:
    file = example(vm_bay, "four-vms.toml")
    vm_bay.ok("up", str(file))
    names = [f"four-vms-web-{number}" for number in (1, 2, 3, 4)]
    assert states(vm_bay) == dict.fromkeys(names, "running")
    assert "nothing to do" in vm_bay.ok("up", str(file))
    sessions = {entry["name"]: entry["sessions"]
                for entry in vm_bay.json("target", "status")["controllers"]}  # fmt: skip
    assert sessions == {f"vm.{name}.{disk}": 1 for name in names for disk in ("system", "data")}
    ports = [vm_bay.info(name)["nets"][0]["forward"][0] for name in names]
    assert ports == [f"127.0.0.1:{8081 + number}:80" for number in range(4)]
    # Another lab may use the same names, and is touched by nobody.
    other = file.with_name("other.toml")
    other.write_text('[vm.web-1]\nimage = "tiny"\nmemory = "96M"\n')
    vm_bay.ok("up", str(other))
    # One VM fewer: told of, and gone by --prune alone.
    edit(file, "count = 4", "count = 3")
    assert "VM 'four-vms-web-4'; --prune deletes it" in vm_bay.ok("up", str(file))
    assert states(vm_bay)["four-vms-web-4"] == "running"
    vm_bay.ok("up", str(file), "--prune", "--yes")
    assert "four-vms-web-4" not in states(vm_bay)
    assert "four-vms-data-4" not in vm_bay.disks()
    edit(file, 'size = "1G"', 'size = "512M"')
    assert "--recreate data-1" in vm_bay.refused("up", str(file))
    done = vm_bay.json("down", str(file), "--force")
    assert done["ended"] == dict.fromkeys(names[:3], "by force")
    assert states(vm_bay) == {**dict.fromkeys(names[:3], "off"), "other-web-1": "running"}
    vm_bay.ok("down", str(file), "--delete", "--yes")
    assert states(vm_bay) == {"other-web-1": "running"}
    vm_bay.ok("down", "other", "--delete", "--yes")


def console(name: str) -> pexpect.spawn[str]:
    """The console of a VM, at its prompt."""
    shell = pexpect.spawn(
        sys.executable, ["-m", "drivebay", "vm", "console", name], encoding="utf-8", timeout=120
    )
    shell.expect("tiny#")
    return shell


def test_what_one_vm_writes_to_a_shared_disk_another_reads(vm_bay: VmBay) -> None:
    """As the example's own comments say it."""
    file = example(vm_bay, "shared-disk.toml")
    vm_bay.ok("up", str(file))
    wait_up(vm_bay, "shared-disk-writer", "shared-disk-reader")
    writer, reader = console("shared-disk-writer"), console("shared-disk-reader")
    writer.sendline("grep -l board /sys/block/vd*/serial")
    writer.expect("/sys/block/vdb/serial")
    writer.sendline("echo hel''lo | dd of=/dev/vdb bs=512 seek=8 conv=sync,fsync && echo do''ne")
    writer.expect("done")
    reader.sendline("dd if=/dev/vdb bs=512 skip=8 count=1 iflag=direct")
    reader.expect("hello")
    for shell in (writer, reader):
        shell.close(force=True)
    ended = vm_bay.json("down", str(file))["ended"]
    assert ended == {"shared-disk-writer": "off", "shared-disk-reader": "off"}
    vm_bay.ok("down", str(file), "--delete", "--yes")


def test_a_fleet_takes_up_hardly_anything(vm_bay: VmBay) -> None:
    file = example(vm_bay, "fleet.toml")
    vm_bay.ok("up", str(file))
    assert list(states(vm_bay).values()) == ["running"] * 8
    vm_bay.ok("down", str(file), "--force")
    assert vm_bay.json("pool", "info", "fleet-disk")["used"] < 8 * (64 << 20)
    edit(file, "count = 8", "count = 9")
    assert "would make VM 'fleet-node-9'" in vm_bay.ok("up", str(file), "--dry-run")
    assert len(states(vm_bay)) == 8
    vm_bay.ok("down", str(file), "--delete", "--yes")


@pytest.mark.parametrize(
    "last_words", ["make disk 'four-vms-data-2'", "make VM 'four-vms-web-2'", "start VMs"]
)
def test_an_up_that_was_killed_is_gone_on_with(vm_bay: VmBay, last_words: str) -> None:
    file = example(vm_bay, "four-vms.toml")
    command = [sys.executable, "-m", "drivebay", "up", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(last_words):
            assert process.poll() is None
        if last_words == "start VMs":  # four QEMUs begin at the same time
            while not list(vm_bay.folder.glob("data/drivebay/vms/*/running.json")):
                assert process.poll() is None
        process.kill()
    vm_bay.ok("up", str(file))
    assert states(vm_bay) == {f"four-vms-web-{n}": "running" for n in (1, 2, 3, 4)}
    assert "nothing to do" in vm_bay.ok("up", str(file))
    record = json.loads((vm_bay.folder / "data/drivebay/labs/four-vms.json").read_text())
    assert all(thing["finished"] for thing in record["things"])
    vm_bay.ok("down", str(file), "--delete", "--yes")
