"""vm/command.py: what is behind an interface, in QEMU's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.vm.command import command_line, netdev
from drivebay.vm.hardware import (
    Hardware,
    InBridge,
    Listener,
    Memory,
    NamedTap,
    Nic,
    OpenTap,
    OwnNet,
)
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import Forward, NetSpec
from drivebay.vm.user_net import user_net

MAC = "52:54:00:12:34:56"
QEMU = Qemu(Path("/qemu"), (7, 2))


def line(*nics: Nic) -> list[str]:
    hardware = Hardware("web", Memory(65536), Listener(Path("/m")), [], nics=nics)
    return command_line(QEMU, Accelerator("tcg", "a test"), hardware)


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (OwnNet(), "user,id=n"),
        (OwnNet(restrict=True), "user,id=n,restrict=on,ipv6=off"),
        (
            OwnNet([Forward(2222, 22), Forward(53, 5353, "0.0.0.0", protocol="udp")], "10.0.2.50"),
            (
                "user,id=n,hostfwd=tcp:127.0.0.1:2222-10.0.2.50:22,"
                "hostfwd=udp:0.0.0.0:53-10.0.2.50:5353"
            ),
        ),
        (
            OwnNet(
                [Forward(1, 2, guest_address="192.168.76.9")],
                addresses=user_net(NetSpec("user", MAC, subnet="192.168.76.0/24")),
            ),
            (
                "user,id=n,net=192.168.76.0/24,host=192.168.76.2,dns=192.168.76.3,"
                "dhcpstart=192.168.76.15,hostfwd=tcp:127.0.0.1:1-192.168.76.9:2"
            ),
        ),
        (OpenTap([7]), "tap,id=n,fd=7,vhost=off"),
        (OpenTap([7], [8]), "tap,id=n,fd=7,vhost=on,vhostfd=8"),
        (OpenTap([7, 9]), "tap,id=n,fds=7:9,vhost=off"),
        (OpenTap([7, 9], [8, 10]), "tap,id=n,fds=7:9,vhost=on,vhostfds=8:10"),
        (InBridge("br0"), "bridge,id=n,br=br0"),
        (NamedTap("tap1", "/up"), "tap,id=n,ifname=tap1,script=/up,downscript=no"),
    ],
)
def test_what_is_behind_an_interface(
    behind: OwnNet | OpenTap | InBridge | NamedTap, said: str
) -> None:
    assert netdev(Nic(MAC, behind), "n") == said


def test_a_device_has_as_many_queues_as_its_tap() -> None:
    words = line(Nic(MAC, OpenTap([3, 4, 5])), Nic(MAC, OpenTap([6])), Nic(MAC, model="e1000"))
    assert f"virtio-net-pci,netdev=net0,mac={MAC},romfile=,addr=0x3,mq=on,vectors=8" in words
    assert f"virtio-net-pci,netdev=net1,mac={MAC},romfile=,addr=0x4" in words
    assert f"e1000,netdev=net2,mac={MAC},romfile=,addr=0x5" in words


@pytest.mark.parametrize("behind", [OwnNet(), OpenTap([3]), NamedTap("tap1")])
def test_a_qemu_of_ours_starts_no_program(behind: OwnNet | OpenTap | NamedTap) -> None:
    assert "on,obsolete=deny,elevateprivileges=deny,spawn=deny" in line(Nic(MAC, behind))


@pytest.mark.parametrize("behind", [InBridge("br0"), NamedTap("tap1", downscript="/down")])
def test_a_machine_that_somebody_types_may_start_what_it_needs(
    behind: InBridge | NamedTap,
) -> None:
    assert "on,obsolete=deny" in line(Nic(MAC, behind))
