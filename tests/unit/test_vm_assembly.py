"""vm/assembly.py: which hardware a vm.toml becomes, and what is opened for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivebay.errors import NotFound
from drivebay.vm import assembly
from drivebay.vm.assembly import Once, Paths, assemble
from drivebay.vm.hardware import (
    SPARE_PORTS,
    Cd,
    Disk,
    Drive,
    Firmware,
    Hardware,
    Listener,
    Memory,
    OwnNet,
    Share,
)
from drivebay.vm.placement import Placement
from drivebay.vm.spec import Boot, CloudInit, DiskSpec, Forward, NetSpec, ShareSpec, VmSpec
from drivebay.vm.store import Vm
from tests.unit.vm_world import MIB, World, bare

FOLDER = Path("/vms/web")
SOCKETS = {"a": Path("/run/a"), "b": Path("/run/b")}


class Asked(Paths):
    """Remembers how files are wanted."""

    def __init__(self) -> None:
        self.wanted: list[tuple[str, int]] = []

    def file(self, path: Path, flags: int = os.O_RDONLY) -> str:
        self.wanted.append((str(path), flags))
        return super().file(path, flags)


@pytest.fixture(autouse=True)
def no_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, number in (("free", 0), ("reserved", 0)):
        (tmp_path / name).write_text(f"{number}\n")
    monkeypatch.setattr(assembly, "_FREE_HUGE_PAGES", tmp_path / "free")
    monkeypatch.setattr(assembly, "_RESERVED_HUGE_PAGES", tmp_path / "reserved")
    return tmp_path


def machine(
    spec: VmSpec,
    places: Paths | None = None,
    place: Placement | None = None,
    once: Once | None = None,
) -> Hardware:
    vm = Vm(FOLDER, spec, "")
    return assemble(vm, places or Paths(), SOCKETS, place or Placement(), once=once or Once())


def test_disks_of_the_target_and_the_first_is_booted() -> None:
    disks = (DiskSpec("a", "p/a"), DiskSpec("b", "p/b", bus="scsi"))
    made = machine(bare("web", *disks, cpus=3))
    assert made.disks == [
        Disk(Path("/run/a"), 3, name="a", boot_order=0),
        Disk(Path("/run/b"), 3, name="b", bus="scsi"),
    ]
    assert (made.ports, made.cpus, made.memory) == (SPARE_PORTS, 3, Memory(64 << 10))
    many = machine(bare("web", *disks, cpus=17, bus="nvme")).disks
    assert [(disk.bus, disk.queues) for disk in many if isinstance(disk, Disk)] == [
        ("nvme", 16),
        ("scsi", 16),
    ]


def test_a_kernel_that_is_started_directly_boots_from_no_disk() -> None:
    made = machine(bare("web", DiskSpec("a", "p/a"), boot=Boot("/k", "/i", "quiet")))
    assert made.disks == [Disk(Path("/run/a"), 1, name="a")]
    assert made.start is not None
    assert (made.start.kernel, made.start.initrd, made.start.append) == ("/k", "/i", "quiet")
    alone = machine(bare("web", boot=Boot("/k"))).start
    assert alone is not None
    assert alone.initrd is None


@pytest.mark.parametrize(
    ("once", "boot", "disk_order", "cd_order"),
    [
        (Once(), None, 0, 1),
        (Once(iso_first=True), None, 1, 0),
        (Once(), Boot("/k"), None, None),
        (Once(iso_first=True), Boot("/k"), 1, 0),
        (Once(boot=Boot("/installer")), None, None, None),
        (Once(boot=Boot("/installer")), Boot("/k"), None, None),
    ],
)
def test_the_cd_comes_after_the_first_disk_or_once_before_it(
    once: Once, boot: Boot | None, disk_order: int | None, cd_order: int | None
) -> None:
    asked = Asked()
    disks = (DiskSpec("a", "p/a"), DiskSpec("b", "p/b"))
    made = machine(bare("web", *disks, iso="/x.iso", boot=boot), asked, once=once)
    assert [disk.boot_order for disk in made.disks] == [disk_order, None]
    assert made.cd == Cd("/x.iso", cd_order)
    assert asked.wanted == [("/x.iso", os.O_RDONLY)]
    started = once.boot or (None if once.iso_first else boot)
    assert (made.start and made.start.kernel) == (started and started.kernel)
    assert made.ends_at_reboot == (once.boot is not None)


def test_the_seed_is_read_only_and_last() -> None:
    asked = Asked()
    spec = bare("web", DiskSpec("a", "p/a"), cloud_init=CloudInit("i", "web"), bus="scsi")
    made = machine(spec, asked)
    assert made.disks[1:] == [Drive("seed", "/vms/web/seed.iso", read_only=True)]
    assert asked.wanted == [("/vms/web/seed.iso", os.O_RDONLY)]


def test_an_overlay_is_written_and_its_image_read(world: World) -> None:
    asked = Asked()
    image = world.image()
    overlay = DiskSpec("s", overlay="s.qcow2", made=True, bus="sata")
    made = machine(bare("web", overlay, image="debian"), asked)
    assert made.disks == [
        Drive("s", "/vms/web/s.qcow2", "qcow2", str(image.path), bus="sata", boot_order=0)
    ]
    assert set(asked.wanted) == {
        (str(image.path), os.O_RDONLY),
        ("/vms/web/s.qcow2", os.O_RDWR),
    }
    with pytest.raises(NotFound, match="no image 'gone'"):
        machine(bare("web", overlay, image="gone"))
    (alone,) = machine(bare("web", overlay)).disks
    assert isinstance(alone, Drive)
    assert alone.backing is None


def test_uefi_writes_its_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(assembly, "find_uefi", lambda: (Path("/code"), Path("/empty")))
    made = machine(bare("web", firmware="uefi"), asked)
    assert made.firmware == Firmware("/code", "/vms/web/vars.fd")
    assert set(asked.wanted) == {("/code", os.O_RDONLY), ("/vms/web/vars.fd", os.O_RDWR)}
    assert machine(bare("web")).firmware is None


def test_sockets_lie_in_the_vms_folder() -> None:
    made = machine(bare("web"))
    assert made.monitor == Listener(FOLDER / "monitor.sock")
    assert made.serials == [("console", Listener(FOLDER / "console.sock", f"{FOLDER}/console.log"))]
    assert made.agent == Listener(FOLDER / "agent.sock")
    assert made.screen


def test_a_share_has_the_connection_that_is_there_or_a_socket_in_the_folder() -> None:
    shares = (ShareSpec("/src", "src"), ShareSpec("/data", "data", read_only=True))
    spec = bare("web", shares=shares)
    made = assemble(Vm(FOLDER, spec, ""), Paths(), {}, Placement(), {"src": 7})
    assert made.shares == [
        Share("src", 7, "/src"),
        Share("data", FOLDER / "share-data.sock", "/data", read_only=True),
    ]


def test_forwards_lead_to_a_static_address() -> None:
    forward = (Forward(2222, 22),)
    nets = (
        NetSpec("user", "52:54:00:00:00:01", forward),
        NetSpec("user", "52:54:00:00:00:02", forward, address="10.0.2.50/24"),
    )
    made = machine(bare("web", nets=nets, qemu_args=("-no-reboot",)))
    assert [nic.behind for nic in made.nics] == [
        OwnNet(forward),
        OwnNet(forward, "10.0.2.50"),
    ]
    assert [nic.mac for nic in made.nics] == [net.mac for net in nets]
    assert (made.more, made.uuid, made.machine) == (
        ("-no-reboot",), bare("web").uuid, "pc-q35-7.2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("free", "reserved", "memory", "huge"),
    [
        (32, 0, 64 * MIB, True),
        (31, 0, 64 * MIB, False),
        (33, 2, 64 * MIB, False),
        (99, 2, 63 * MIB, False),
    ],
)
def test_huge_pages_that_nobody_has_asked_for(
    no_huge_pages: Path, free: int, reserved: int, memory: int, huge: bool
) -> None:
    (no_huge_pages / "free").write_text(f"{free}\n")
    (no_huge_pages / "reserved").write_text(f"{reserved}\n")
    made = machine(bare("web", memory=memory), place=Placement(1))
    assert made.memory == Memory(memory // 1024, 1, huge)
    (no_huge_pages / "free").unlink()
    assert not machine(bare("web")).memory.huge_pages
