"""vm/net_words.py: --net in our words and in QEMU's, and what is not understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import UsageError
from drivebay.vm.net_words import read_hostfwd, read_net_words, read_nets
from drivebay.vm.spec import Forward, NetSpec

SSH = Forward(2222, 22)


@pytest.mark.parametrize(
    ("text", "net"),
    [
        ("user", NetSpec("user", "")),
        ("user,hostfwd=tcp::2222-:22", NetSpec("user", "", (SSH,))),
        ("user,hostfwd=:127.0.0.1:2222-:22", NetSpec("user", "", (SSH,))),
        ("user,hostfwd=tcp:0.0.0.0:2222-:22", NetSpec("user", "", (Forward(2222, 22, "0.0.0.0"),))),
        ("user,hostfwd=udp::53-10.0.2.15:53,hostfwd=tcp::2222-:22",
         NetSpec("user", "", (Forward(53, 53, guest_address="10.0.2.15", protocol="udp"), SSH))),
        ("user,forward=2222:22,restrict", NetSpec("user", "", (SSH,), restrict=True)),
        ("user,restrict=on", NetSpec("user", "", restrict=True)),
        ("user,restrict=off", NetSpec("user", "")),
        ("user,net=192.168.76.0/24,dhcpstart=192.168.76.9",
         NetSpec("user", "", subnet="192.168.76.0/24", dhcp_start="192.168.76.9")),
        ("user,subnet=192.168.76.0/24", NetSpec("user", "", subnet="192.168.76.0/24")),
        ("lan", NetSpec("network", "", network="lan")),
        ("network=lan,model=e1000,mac=52:54:00:AB:00:01",
         NetSpec("network", "52:54:00:ab:00:01", network="lan", model="e1000")),
        ("lan,address=192.168.100.50/24,gateway=192.168.100.1,dns=1.1.1.1,dns=9.9.9.9",
         NetSpec("network", "", (), "192.168.100.50/24", "192.168.100.1", ("1.1.1.1", "9.9.9.9"),
                 network="lan")),
        ("bridge=br0", NetSpec("bridge", "", bridge="br0")),
        ("bridge,br=br0", NetSpec("bridge", "", bridge="br0")),
        ("tap,ifname=tap1,script=/etc/up,downscript=no",
         NetSpec("tap", "", ifname="tap1", script="/etc/up")),
        ("tap,ifname=tap1,downscript=down",
         NetSpec("tap", "", ifname="tap1", downscript=str(Path("down").absolute()))),
    ],
)  # fmt: skip
def test_what_is_understood(text: str, net: NetSpec) -> None:
    assert read_net_words(text) == net


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("", "should begin with what", "user, the name"),
        ("hostfwd=tcp::1-:2", "should begin with what", "user, the name"),
        ("user,restric", "'restric' is not understood", "is 'restrict' meant?"),
        ("user,id=n0", "'id' is not understood", "known are forward, hostfwd, restrict"),
        ("lan,hostfwd=tcp::1-:2", "'hostfwd' goes with user, and not with network", ""),
        ("user,ifname=tap0", "'ifname' goes with tap, and not with user", ""),
        ("user,restrict=maybe", "restrict is on or off, not 'maybe'", ""),
        ("user,restrict=", "restrict is on or off", ""),
        ("user,subnet", "'subnet' has no value", "subnet=…"),
        ("user,subnet=10.1.0.0/24,net=10.2.0.0/24", "'net' is said twice", ""),
        ("user,hostfwd=tcp::22", "is no port forward", "hostfwd=tcp:127.0.0.1:2222-:22"),
        ("user,hostfwd=tcp:[::]:22-:22", "IPv4 only", ""),
        ("user,hostfwd=sctp::22-:22", "is no port forward", ""),
        ("user,hostfwd=tcp:localhost:22-:22", "is no port forward", ""),
        ("user,hostfwd=tcp::0-:22", "is no port forward", ""),
        ("user,hostfwd=tcp::22-10.0.3.1:22", "not in the guest's network 10.0.2.0/24", ""),
        ("user,net=10.0.2.0/24,dhcpstart=10.0.3.15", "no free address of the subnet", ""),
        ("lan,model=rtl8139", "there is no model 'rtl8139'", "virtio, e1000"),
        ("lan,mac=1", "no MAC address", ""),
        ("tap", "the kind 'tap' needs 'ifname'", ""),
        ("bridge", "the kind 'bridge' needs 'bridge'", ""),
        ("bridge=br 0", "can't be the name of an interface", ""),
    ],
)
def test_what_is_refused(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_net_words(text)
    assert hint in (caught.value.hint or "")


def test_a_forward_listens_where_only_this_host_reaches_it() -> None:
    assert read_hostfwd("tcp::80-:8080").host_address == "127.0.0.1"
    assert read_hostfwd("tcp:0.0.0.0:80-:8080").host_address == "0.0.0.0"


def test_none_is_alone() -> None:
    assert read_nets(None) == (NetSpec("user", ""),)
    assert read_nets(["none"]) == ()
    assert len(read_nets(["user", "lan"])) == 2
    with pytest.raises(UsageError, match="goes with no other --net"):
        read_nets(["none", "user"])
