"""The images that we build start from a disk that our target serves."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.vm.command import command_line
from drivebay.vm.hardware import Disk, Drive, Hardware, Listener, Memory, Nic
from drivebay.vm.images import tiny
from drivebay.vm.kvm import choose_accelerator
from drivebay.vm.processes import Child, start, unprivileged
from drivebay.vm.qemu import find_qemu
from drivebay.vm.qmp import Qmp
from drivebay.vm.seed import HostKey, seed_iso
from drivebay.vm.spec import CloudInit, NetSpec, VmSpec
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = 400.0  # under emulation on busy cores; a quiet machine needs a fraction of it
END_SECONDS = 60.0
MAC = "52:54:00:12:34:56"


@dataclass
class Guest:
    """A machine that was started by its firmware, and what it has said on its serial port."""

    child: Child
    console: Path
    monitor: Path

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while words not in self.said():
            assert not self.child.ended(), f"QEMU ended and said: {self.child.last_words()}"
            assert time.monotonic() < deadline, f"no '{words}' on the console"
            time.sleep(0.1)

    def said(self) -> str:
        return self.console.read_text(errors="replace")

    def press_power_button(self) -> int:
        with Qmp(self.monitor) as monitor:
            monitor.call("system_powerdown")
        return self.child.process.wait(END_SECONDS)


@contextmanager
def started(
    target: TargetProcess, raw: Path, folder: Path, logs: Path, memory_mib: int, *more: Drive
) -> Iterator[Guest]:
    """A machine that starts from a copy of ``raw``, behind a vhost-user socket."""
    name = raw.stem[:8]
    disk, own, console = (
        folder / f"{name}.raw",
        folder / f"{name}-qemu",
        logs / f"{name}-console.log",
    )
    subprocess.run(["cp", "--sparse=always", raw, disk], check=True)
    disk.chmod(0o600)
    target.call("bdev_aio_create", name=name, filename=str(disk), block_size=512)
    target.call("vhost_create_blk_controller", ctrlr=name, dev_name=name)
    own.mkdir(mode=0o700)
    identity = unprivileged()
    if identity is not None:
        for path in (own, target.controller_socket(name)):
            identity.take(path)
    with console.open("ab") as log:
        hardware = Hardware(
            name=name,
            memory=Memory(memory_mib * 1024),
            monitor=Listener(own / "monitor"),
            serials=[("console", Listener(own / "console", "/dev/fdset/1"))],
            disks=[Disk(target.controller_socket(name), queues=2, boot_order=0), *more],
            nics=[Nic(MAC)],
            files=[(log.fileno(), 1)],
        )
        line = command_line(find_qemu(), choose_accelerator(), hardware)
        said = logs / f"{name}-qemu.log"
        child = start(name, line, said, pass_fds=(log.fileno(),), identity=identity)
    try:
        yield Guest(child, console, own / "monitor")
    finally:
        child.stop()
        target.call("vhost_delete_controller", ctrlr=name)
        target.call("bdev_aio_delete", name=name)
        disk.unlink()


@pytest.fixture
def seed(folder: Path) -> Drive:
    """What `vm start` tells a guest with cloud-init: here above all its name."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    public = key.with_name("key.pub").read_text()
    spec = VmSpec(
        name="bay",
        uuid="1f0c4c5a-6b7d-4c1e-9a53-0d2f5a1b7c33",
        machine="q35",
        memory=1 << 30,
        cpus=2,
        nets=(NetSpec("user", MAC),),
        cloud_init=CloudInit("first", "bay"),
    )
    path = folder / "seed.iso"
    path.write_bytes(seed_iso(spec, public, HostKey(key.read_text(), public), None))
    path.chmod(0o644)
    return Drive("seed", str(path), read_only=True)


def test_debian_starts_by_bios_and_asks_by_its_name_who_is_there(
    debian_image: Path, target: TargetProcess, folder: Path, logs: Path, seed: Drive
) -> None:
    with started(target, debian_image, folder, logs, 1024, seed) as guest:
        guest.wait_for("\nbay login: ")
        assert "Debian GNU/Linux" in guest.said()
    assert "FAILED" not in guest.said(), "a service did not start"


def test_the_tiny_guest_is_up_with_an_address_and_ends_by_its_power_button(
    target: TargetProcess, folder: Path, logs: Path
) -> None:
    said: list[str] = []
    work = folder / "work"
    work.mkdir()
    built = tiny.build_tiny(work, said.append)
    assert list(work.iterdir()) == [built.raw]
    assert said[-1].startswith("making a disk with Linux ")
    with started(target, built.raw, folder, logs, 128) as guest:
        guest.wait_for(tiny.UP)
        assert "tiny has 10.0.2.15/24" in guest.said()
        assert guest.press_power_button() == 0
    built.raw.unlink()
