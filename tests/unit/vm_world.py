"""A user's VMs and images in folders of a test, and a target that is a model of one."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.disks.connection import connect
from drivebay.disks.inventory import Inventory, read_inventory
from drivebay.vm.images.store import Image, ImageFacts, Images
from drivebay.vm.spec import DiskSpec, VmSpec
from drivebay.vm.store import Vm, Vms
from tests.fakes.lvol_target import LvolTarget
from tests.unit.vm_folder import UUID

__all__ = ["MIB", "World", "bare", "idle_process", "made_world"]

MIB = 1 << 20


class World:
    """The environment leads to its folders; ``socket`` is the target's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = str(folder / "s")
        self.target = LvolTarget(folder / "s")
        self.client = connect(self.socket)
        self.vms = Vms()

    def close(self) -> None:
        self.client.close()
        self.target.close()

    def inventory(self) -> Inventory:
        return read_inventory(self.client)

    def pool(self, name: str = "p") -> str:
        """A pool of 1 GiB, of whose making the target says nothing."""
        file = self.folder / f"{name}.img"
        with file.open("wb") as opened:
            opened.truncate(1 << 30)
        self.target.bdev_aio_create(f"pool-{name}", str(file))
        self.target.bdev_lvol_create_lvstore(f"pool-{name}", name)
        return name

    def volume(self, name: str, pool: str = "p") -> str:
        self.target.bdev_lvol_create(name, 64, pool, True)
        return f"{pool}/{name}"

    def volumes(self) -> list[str]:
        """What is in the pools, sorted."""
        return sorted(f"{store}/{name}" for store, name in self.target.volumes)

    def image(self, name: str = "debian", size: int = 8 * MIB) -> Image:
        images = Images()
        with images.workspace() as work:
            raw = work / "disk"
            with raw.open("wb") as opened:
                opened.truncate(size)
            return images.add(name, raw, ImageFacts("a test"))

    def vm(self, name: str, *disks: DiskSpec, **changed: object) -> Vm:
        """A VM without keys."""
        return self.vms.create(bare(name, *disks, **changed), lambda vm: None)


def bare(name: str, *disks: DiskSpec, **changed: object) -> VmSpec:
    """A VM with those disks, and nothing else."""
    values: dict[str, object] = {
        "name": name,
        "uuid": UUID,
        "machine": "pc-q35-7.2",
        "memory": 64 * MIB,
        "cpus": 1,
        "disks": disks,
        **changed,
    }
    return VmSpec(**values)  # type: ignore[arg-type]


@contextmanager
def made_world(patch: pytest.MonkeyPatch) -> Iterator[World]:
    """pytest's own folder may be too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU's own user passes through to the sockets of its disks
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        world = World(folder)
        yield world
        world.close()


@contextmanager
def idle_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, for a VM to seem to run."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()
