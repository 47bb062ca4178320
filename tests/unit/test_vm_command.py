"""vm/command.py: a machine's parts in the words of a QEMU's version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.errors import NotFound, UsageError
from drivebay.vm.command import command_line, spelled
from drivebay.vm.hardware import Cd, Disk, Drive, Hardware, Listener, Memory, Share, Vnc
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu, Version

TCG = Accelerator("tcg", "")
BARE = Hardware("vm", Memory(384 << 10), Listener(Path("/monitor")), [])
MAC = "52:54:00:12:34:56"


def words(hardware: Hardware, version: Version = (7, 2)) -> list[str]:
    return command_line(Qemu(Path("/qemu"), version), TCG, hardware)


def after(line: Sequence[str], option: str) -> list[str]:
    return [line[at + 1] for at, word in enumerate(line) if word == option]


def with_disks(*disks: Disk | Drive) -> Hardware:
    return replace(BARE, disks=disks)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((7, 2), "reconnect=1"),
        ((9, 1), "reconnect=1"),
        ((9, 2), "reconnect-ms=1000"),
        ((11, 1), "reconnect-ms=1000"),
    ],
)
def test_reconnection_is_asked_for_in_the_versions_words(version: Version, expected: str) -> None:
    line = words(with_disks(Disk(Path("/run/disk"), name="a")), version)
    assert f"socket,id=vhost-a,path=/run/disk,{expected}" in after(line, "-chardev")


def test_memory_is_one_shared_memfd_of_the_machines_size() -> None:
    line = words(BARE)
    assert after(line, "-object") == ["memory-backend-memfd,id=memory,size=384M,share=on"]
    assert after(line, "-m") == ["384M"]
    assert after(line, "-machine") == ["q35,memory-backend=memory"]
    line = words(replace(BARE, memory=Memory(1032, node=1, huge_pages=True)))
    assert after(line, "-m") == ["1032K"]
    assert after(line, "-object") == [
        (
            "memory-backend-memfd,id=memory,size=1032K,share=on,hugetlb=on,hugetlbsize=2M,"
            "host-nodes=1,policy=preferred"
        )
    ]


def test_each_disk_has_its_socket_its_queues_its_port_and_no_legacy_interface() -> None:
    line = words(
        with_disks(
            Disk(Path("/a,b"), 3, name="a", boot_order=0), Disk(Path("/c"), name="c", packed=True)
        )
    )
    assert after(line, "-device") == [
        "pcie-root-port,id=port0,bus=pcie.0,chassis=1,addr=0x10.0,multifunction=on",
        "pcie-root-port,id=port1,bus=pcie.0,chassis=2,addr=0x10.1",
        (
            "vhost-user-blk-pci,id=disk-a,bus=port0,chardev=vhost-a,disable-legacy=on,num-queues=3,"
            "bootindex=0"
        ),
        (
            "vhost-user-blk-pci,id=disk-c,bus=port1,chardev=vhost-c,disable-legacy=on,num-queues=1,"
            "packed=on"
        ),
    ]
    assert "socket,id=vhost-a,path=/a,,b,reconnect=1" in after(line, "-chardev")


def test_a_screen_is_on_slots_that_no_disk_or_interface_has_and_vnc_listens_nowhere() -> None:
    line = words(replace(BARE, screen=True))
    assert after(line, "-device") == [
        "VGA,id=screen,bus=pcie.0,addr=0x18",
        "qemu-xhci,id=usb,bus=pcie.0,addr=0x19",
        "usb-tablet,id=pointer,bus=usb.0",
    ]
    assert after(line, "-vnc") == ["none"]
    assert "-vnc" not in words(BARE)


def test_a_share_has_a_port_behind_those_of_the_disks_and_the_spare_ones() -> None:
    shares = [Share("src", 7, "/src"), Share("data", Path("/d,s"), "/data", read_only=True)]
    disks = (Disk(Path("/a"), name="a"),)
    line = words(replace(BARE, disks=disks, ports=2, shares=shares))
    assert [word for word in after(line, "-device") if "fs" in word] == [
        "vhost-user-fs-pci,bus=port3,chardev=share-src,tag=src,queue-size=1024",
        "vhost-user-fs-pci,bus=port4,chardev=share-data,tag=data,queue-size=1024",
    ]
    assert "pcie-root-port,id=port4,bus=pcie.0,chassis=5,addr=0x10.4" in after(line, "-device")
    assert after(line, "-chardev")[-2:] == [
        "socket,id=share-src,fd=7",
        "socket,id=share-data,path=/d,,s",
    ]
    with pytest.raises(UsageError, match="at most 60 disks and shared folders"):
        words(replace(BARE, ports=4, shares=shares * 31))


def test_a_cd_is_in_the_last_sata_port_and_read_only() -> None:
    line = words(replace(BARE, cd=Cd("/a,b.iso", 1)))
    assert after(line, "-blockdev") == [
        "file,node-name=cd-medium,filename=/a,,b.iso,read-only=on,discard=unmap"
    ]
    assert after(line, "-device") == ["ide-cd,id=cd,drive=cd-medium,bus=ide.5,bootindex=1"]
    line = words(replace(BARE, cd=Cd("/a.iso")))
    assert after(line, "-device") == ["ide-cd,id=cd,drive=cd-medium,bus=ide.5"]


def test_a_machine_may_end_when_its_guest_reboots() -> None:
    assert "-no-reboot" not in words(BARE)
    assert "-no-reboot" in words(replace(BARE, ends_at_reboot=True))


@pytest.mark.parametrize(
    ("vnc", "words_of_vnc", "objects"),
    [
        (Vnc("127.0.0.1", 5901), "127.0.0.1:1", []),
        (Vnc("::1", 5900, "/pw"), "[::1]:0,password-secret=vnc-password",
         ["secret,id=vnc-password,file=/pw"]),
        (Vnc("0.0.0.0", 6000, tls="/c"), "0.0.0.0:100,tls-creds=vnc-tls",
         ["tls-creds-x509,id=vnc-tls,dir=/c,endpoint=server,verify-peer=on"]),
        (Vnc("0.0.0.0", 5902, "/pw", "/c"),
         "0.0.0.0:2,password-secret=vnc-password,tls-creds=vnc-tls",
         ["secret,id=vnc-password,file=/pw",
          "tls-creds-x509,id=vnc-tls,dir=/c,endpoint=server,verify-peer=off"]),
    ],
)  # fmt: skip
def test_vnc_asks_for_a_password_or_else_for_a_certificate(
    vnc: Vnc, words_of_vnc: str, objects: list[str]
) -> None:
    line = words(replace(BARE, screen=True, vnc=vnc))
    assert after(line, "-vnc") == [words_of_vnc]
    assert after(line, "-object")[1:] == objects


def test_only_a_machine_that_waits_for_another_starts_without_its_guest() -> None:
    waiting = words(replace(BARE, awaits_migration=True))
    assert after(waiting, "-incoming") == ["defer"]
    assert after(words(BARE), "-incoming") == []


def test_a_listening_descriptor_takes_the_place_of_a_path() -> None:
    console = Listener(7, log="/dev/fdset/1")
    line = words(replace(BARE, serials=[("console", console)], files=[(9, 1)]))
    assert "socket,id=console,fd=7,server=on,wait=off,logfile=/dev/fdset/1,logappend=on" in after(
        line, "-chardev"
    )
    assert after(line, "-add-fd") == ["fd=9,set=1"]


def test_a_socket_path_that_the_kernel_would_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="has 109 bytes, the kernel takes at most 107"):
        words(with_disks(Disk(Path("/" + "x" * 108), name="a")))


def test_other_buses_need_a_qemu_that_is_a_vhost_user_client() -> None:
    machine = with_disks(Disk(Path("/s"), name="a", bus="nvme"))
    with pytest.raises(NotFound, match=r"a disk on the bus 'nvme' needs the block driver") as error:
        words(machine)
    assert "--qemu PATH" in str(error.value.hint)
    able = Qemu(Path("/q"), (11, 1), frozenset({"vhost-user-block-driver"}))
    line = command_line(able, TCG, machine)
    assert after(line, "-blockdev") == [
        "virtio-blk-vhost-user,node-name=node-a,path=/s,cache.direct=on"
    ]
    assert after(line, "-device")[-1] == "nvme,id=disk-a,drive=node-a,bus=port0,serial=a"


def test_properties_are_spelled_with_doubled_commas_and_dots_for_depth() -> None:
    assert spelled({"driver": "file", "path": "a,b", "cache": {"direct": True}, "n": 1}) == (
        "file,path=a,,b,cache.direct=on,n=1"
    )
