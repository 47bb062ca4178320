"""vm/libvirt.py: the domain of a machine; libvirt's own schema reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from drivebay.errors import UsageError
from drivebay.vm.hardware import (
    Cd,
    Disk,
    Drive,
    Firmware,
    Hardware,
    InBridge,
    Listener,
    Memory,
    NamedTap,
    Nic,
    OwnNet,
    Share,
    Start,
)
from drivebay.vm.kvm import Accelerator
from drivebay.vm.libvirt import Domain, domain_xml
from drivebay.vm.qemu import FEATURES, Qemu
from drivebay.vm.spec import Forward, NetSpec
from drivebay.vm.user_net import user_net

QEMU = Qemu(Path("/usr/bin/qemu-system-x86_64"), (11, 1), frozenset(FEATURES))
TCG = Accelerator("tcg", "")
MAC = "52:54:00:12:34:56"
BARE = Hardware(
    "web",
    Memory(384 << 10),
    Listener(Path("/monitor")),
    [("console", Listener(Path("/console")))],
    uuid="0f5b5f3e-9d46-4f4c-8a3e-0c5c6a1f7f11",
    machine="pc-q35-7.2",
)
ARG = "{http://libvirt.org/schemas/domain/qemu/1.0}arg"


def made(hardware: Hardware, user: tuple[int, int] | None = None) -> Domain:
    return domain_xml(QEMU, TCG, hardware, user)


def read(domain: Domain) -> ElementTree.Element:
    return ElementTree.fromstring(domain.xml)


def words(domain: Domain) -> list[str | None]:
    return [arg.get("value") for arg in read(domain).iter(ARG)]


def with_disks(*disks: Disk | Drive) -> Hardware:
    return replace(BARE, disks=disks)


EVERYTHING = replace(
    BARE,
    memory=Memory(384 << 10, node=0, huge_pages=True),
    cpus=3,
    disks=[
        Disk(Path("/run/a"), 3, name="system", boot_order=0),
        Drive("over", "/vms/web/over.qcow2", "qcow2", "/images/debian/image.raw"),
        Drive("seed", "/vms/web/seed.iso", read_only=True, bus="sata"),
        Disk(Path("/run/b"), name="fast", bus="nvme"),
        Disk(Path("/run/c"), name="lun", bus="scsi"),
        Disk(Path("/run/d"), name="more", bus="scsi"),
        Disk(Path("/run/e"), name="slow", bus="sata"),
    ],
    cd=Cd("/srv/debian 12.iso", 1),
    nics=[
        Nic(MAC, OwnNet([Forward(2222, 22)], "10.0.2.50")),
        Nic("52:54:00:12:34:57"),
        Nic("52:54:00:12:34:58", InBridge("db-lan"), "e1000"),
        Nic("52:54:00:12:34:59", NamedTap("tap1")),
        Nic("52:54:00:12:34:5a", NamedTap("tap2", "/etc/if & up", "/etc/ifdown")),
    ],
    shares=[Share("src", Path("/s"), "/src & more"), Share("data", Path("/d"), "/data", True)],
    agent=Listener(Path("/agent")),
    screen=True,
    firmware=Firmware("/usr/share/OVMF/OVMF_CODE_4M.fd", "/vms/web/vars.fd"),
    more=["-device", "virtio-rng-pci"],
)
STARTED = replace(
    BARE,
    start=Start("/boot/vmlinuz", "/boot/initrd & more", "root=/dev/vda quote='\"<>'"),
    serials=[("console", Listener(Path("/console"), "/log/web.log"))],
)


@pytest.mark.parametrize("hardware", [BARE, EVERYTHING, STARTED])
@pytest.mark.parametrize("user", [None, (65534, 65534)])
def test_libvirts_schema_accepts_it(
    hardware: Hardware, user: tuple[int, int] | None, tmp_path: Path
) -> None:
    file = tmp_path / "domain.xml"
    file.write_text(made(hardware, user).xml)
    done = subprocess.run(
        ["virt-xml-validate", file, "domain"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_memory_is_shared_and_of_the_machines_size() -> None:
    domain = read(made(replace(BARE, memory=Memory(1032))))
    memory = domain.find("memory")
    assert memory is not None
    assert (memory.text, memory.get("unit")) == ("1032", "KiB")
    assert domain.find("memoryBacking/source[@type='memfd']") is not None
    assert domain.find("memoryBacking/access[@mode='shared']") is not None
    assert domain.find("numatune") is None


def test_kvm_is_used_when_it_works() -> None:
    domain = ElementTree.fromstring(domain_xml(QEMU, Accelerator("kvm", ""), BARE).xml)
    assert domain.get("type") == "kvm"
    assert read(made(BARE)).get("type") == "qemu"


def test_a_disk_of_the_target_has_its_socket_and_its_queues() -> None:
    domain = read(made(EVERYTHING))
    disk = domain.find("devices/disk[@type='vhostuser']")
    assert disk is not None
    parts = {element.tag: dict(element.attrib) for element in disk}
    assert parts == {
        "driver": {"name": "qemu", "type": "raw", "queues": "3"},
        "source": {"type": "unix", "path": "/run/a"},
        "target": {"dev": "vda", "bus": "virtio"},
        "boot": {"order": "1"},
    }


def test_disks_are_named_in_their_order_on_each_bus() -> None:
    many = [Drive(f"d{n}", f"/d{n}") for n in range(28)]
    domain = read(made(with_disks(*many, Drive("s", "/s", bus="sata"))))
    names = [target.get("dev") for target in domain.iter("target")]
    assert [names[n] for n in (0, 25, 26, 27, 28)] == ["vda", "vdz", "vdaa", "vdab", "sda"]


def test_a_shared_folder_is_libvirts_own() -> None:
    src, data = read(made(EVERYTHING)).iter("filesystem")
    parts = {element.tag: dict(element.attrib) for element in src}
    assert parts == {
        "driver": {"type": "virtiofs", "queue": "1024"},
        "source": {"dir": "/src & more"},
        "target": {"dir": "src"},
    }
    assert data.find("readonly") is not None


def test_the_boot_order_counts_from_one() -> None:
    disks = [Drive("a", "/a", boot_order=7), Drive("b", "/b"), Drive("c", "/c", boot_order=0)]
    domain = read(made(with_disks(*disks)))
    assert [boot.get("order") for boot in domain.iter("boot")] == ["2", "1"]


def test_a_screen_is_libvirts_own_and_listens_nowhere() -> None:
    devices = read(made(EVERYTHING)).find("devices")
    assert devices is not None
    assert devices.find("video/model[@type='vga']") is not None
    assert [listen.get("type") for listen in devices.iterfind("graphics/listen")] == ["none"]
    assert devices.find("input[@type='tablet'][@bus='usb']") is not None
    bare = read(made(BARE))
    assert bare.find("devices/video") is None
    assert bare.find("devices/controller[@type='usb'][@model='none']") is not None


def test_a_cd_is_started_after_the_disk() -> None:
    disks = [Drive("a", "/a", boot_order=0), Drive("b", "/b", bus="sata")]
    domain = read(made(replace(with_disks(*disks), cd=Cd("/x.iso", 1))))
    (cd,) = (disk for disk in domain.iter("disk") if disk.get("device") == "cdrom")
    assert cd.find("readonly") is not None
    assert [cd.find(tag).attrib for tag in ("source", "target", "boot")] == [  # type: ignore[union-attr]
        {"file": "/x.iso"},
        {"dev": "sdb", "bus": "sata"},
        {"order": "2"},
    ]


def test_what_libvirt_has_no_element_for_is_in_qemus_words_and_named() -> None:
    domain = made(EVERYTHING)
    assert words(domain) == [
        "-blockdev",
        ("virtio-blk-vhost-user,node-name=node-fast,path=/run/b,cache.direct=on"),
        "-device",
        "nvme,id=disk-fast,drive=node-fast,bus=pcie.0,serial=fast,addr=0x1e",
        "-blockdev",
        "virtio-blk-vhost-user,node-name=node-lun,path=/run/c,cache.direct=on",
        "-device",
        "virtio-scsi-pci,id=beyond,addr=0x1d",
        "-device",
        "scsi-hd,id=disk-lun,drive=node-lun,bus=beyond.0,serial=lun",
        "-blockdev",
        "virtio-blk-vhost-user,node-name=node-more,path=/run/d,cache.direct=on",
        "-device",
        "scsi-hd,id=disk-more,drive=node-more,bus=beyond.0,serial=more",
        "-blockdev",
        "virtio-blk-vhost-user,node-name=node-slow,path=/run/e,cache.direct=on",
        "-device",
        "ide-hd,id=disk-slow,drive=node-slow,serial=slow,bus=ide.5",
        "-netdev",
        "user,id=beyond0,hostfwd=tcp:127.0.0.1:2222-10.0.2.50:22",
        "-device",
        f"virtio-net-pci,netdev=beyond0,mac={MAC},romfile=,addr=0x1c",
        "-device",
        "virtio-rng-pci",
    ]
    prefix = "in QEMU's own words: "
    assert [note.removeprefix(prefix).split(",")[0] for note in domain.notes] == [
        "disk 'fast'",
        "disk 'lun'",
        "disk 'more'",
        "disk 'slow'",
        f"interface {MAC}",
        "qemu_args: -device virtio-rng-pci",
    ]
    assert made(BARE).notes == ()


def test_files_that_qemus_user_cannot_read_are_named() -> None:
    top = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        (top / "open").mkdir()
        names = ("open/kernel", "open/initrd", "secret", "image", "over")
        for name in names:
            (top / name).touch(0o644)
        (top / "secret").chmod(0o600)
        paths = dict(zip(names, [str(top / name) for name in names], strict=True))
        hardware = replace(
            with_disks(
                Drive("a", paths["secret"]), Drive("b", paths["over"], backing=paths["image"])
            ),
            start=Start(paths["open/kernel"], paths["open/initrd"]),
        )
        assert made(hardware).notes == ()
        top.chmod(0o755)
        (only,) = made(hardware, (65534, 65534)).notes
        assert only == f"'{top}/secret' can't be read by user 65534, whom QEMU is"
        assert made(hardware, (os.geteuid(), 65534)).notes == ()
        (top / "open").chmod(0o700)
        (top / "over").unlink()
        assert len(made(hardware, (65534, 65534)).notes) == 4
    finally:
        shutil.rmtree(top)


def test_texts_are_escaped() -> None:
    domain = read(made(STARTED))
    assert domain.findtext("os/initrd") == "/boot/initrd & more"
    assert domain.findtext("os/cmdline") == "root=/dev/vda quote='\"<>'"


def test_a_character_that_xml_cannot_is_refused() -> None:
    with pytest.raises(UsageError, match=r"holds the character '\\x01', which no XML can"):
        made(replace(BARE, more=["-name", "a\x01"]))


def test_qemu_is_the_user_whose_sockets_there_are() -> None:
    assert read(made(BARE)).find("seclabel") is None
    label = read(made(BARE, (65534, 65533))).find("seclabel[@model='dac'][@relabel='no']")
    assert label is not None
    assert label.findtext("label") == "+65534:+65533"


def test_an_interface_is_what_it_joins() -> None:
    domain = read(made(EVERYTHING))
    shown = [
        [element.get("type"), *({**part.attrib, "": part.tag} for part in element)]
        for element in domain.iterfind("devices/interface")
    ]
    assert shown == [
        ["user", {"address": "52:54:00:12:34:57", "": "mac"}, {"type": "virtio", "": "model"}],
        [
            "bridge",
            {"address": "52:54:00:12:34:58", "": "mac"},
            {"bridge": "db-lan", "": "source"},
            {"type": "e1000", "": "model"},
        ],
        [
            "ethernet",
            {"address": "52:54:00:12:34:59", "": "mac"},
            {"dev": "tap1", "managed": "no", "": "target"},
            {"type": "virtio", "": "model"},
        ],
        [
            "ethernet",
            {"address": "52:54:00:12:34:5a", "": "mac"},
            {"dev": "tap2", "": "target"},
            {"path": "/etc/if & up", "": "script"},
            {"path": "/etc/ifdown", "": "downscript"},
            {"type": "virtio", "": "model"},
        ],
    ]


@pytest.mark.parametrize(
    ("own", "lacks"),
    [
        (OwnNet(restrict=True), "knows no restrict"),
        (OwnNet(addresses=user_net(NetSpec("user", MAC, subnet="10.9.0.0/24"))), "addresses of"),
    ],
)
def test_what_libvirts_user_network_lacks_is_in_qemus_words(own: OwnNet, lacks: str) -> None:
    domain = made(replace(BARE, nics=[Nic(MAC, own, "e1000")]))
    (note,) = domain.notes
    assert lacks in note
    assert f"e1000,netdev=beyond0,mac={MAC}" in domain.xml
    assert read(domain).find("devices/interface") is None
