"""vm/lab: networks that a lab's file makes or joins, and VMs with several interfaces in them.

What makes a network of the kernel's parts is tried in tests/e2e/test_net_lab.py; here it is its
folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, DrivebayError, InUse, NotFound, StateError
from drivebay.net.creation import Wish
from drivebay.net.members import read_members
from drivebay.net.model import Network, bridge_name
from drivebay.net.store import Networks
from drivebay.vm.lab import networks as lab_networks
from drivebay.vm.lab.model import LabMistake, network_name
from drivebay.vm.lab.reading import read_lab
from drivebay.vm.lab.record import Labs
from tests.unit.vm_lab_world import LabWorld
from tests.unit.vm_world import World

pytestmark = pytest.mark.needs_root

SUBNET = IPv4Network("192.168.77.0/24")
NETS = """\
[net.back]
mode = "isolated"
[net.lan]
mode = "nat"
subnet = "192.168.50.0/24"
[net.out]
mode = "user"
[vm.web]
count = 2
image = "tiny"
nets = ["lan", { net = "back", model = "e1000" }, { net = "out", forward = ["8080:80"] }]
"""


def plan_creation(plan: Plan, networks: Networks, name: str, wish: Wish) -> None:
    subnet = wish.subnet or IPv4Network("192.168.51.0/24")
    made = Network(name, wish.mode, bridge_name(name), subnet, wish.uplink, wish.mtu, made=True)
    plan.add("make it", lambda: networks.create(made))


def plan_deletion(plan: Plan, networks: Networks, network: Network) -> None:
    if read_members(networks, network.name):
        raise InUse(f"network '{network.name}' is used")
    plan.add("delete it", lambda: networks.delete(network.name))


@pytest.fixture
def lab(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabWorld]:
    monkeypatch.setattr(lab_networks, "plan_creation", plan_creation)
    monkeypatch.setattr(lab_networks, "plan_deletion", plan_deletion)
    monkeypatch.setattr(lab_networks, "differences", lambda *_: iter(()))
    made = LabWorld(world, monkeypatch)
    yield made
    made.close()


def places(network: str) -> list[tuple[str, int]]:
    return [(member.vm, member.index) for member in read_members(Networks(), network)]


def refusal(lab: LabWorld, text: str) -> DrivebayError:
    with pytest.raises(DrivebayError) as caught:
        lab.plan(text)
    return caught.value


# ---- up, and again ------------------------------------------------------------------------------


def test_a_labs_networks_are_made_and_its_vms_have_places(lab: LabWorld) -> None:
    assert lab.up(NETS)[:2] == [
        "make network 'four-lan', mode nat, for [net.lan]",  # whose addresses are said, so first
        "make network 'four-back', mode isolated, for [net.back]",
    ]
    nets = lab.spec("four-web-2").nets
    assert [(net.kind, net.network, net.model) for net in nets] == [
        ("network", "four-lan", "virtio"), ("network", "four-back", "e1000"),
        ("user", None, "virtio"),
    ]  # fmt: skip
    assert [forward.guest_port for forward in nets[2].forward] == [80, 22]
    assert len({net.mac for name in (1, 2) for net in lab.spec(f"four-web-{name}").nets}) == 6
    assert places("four-lan") == [("four-web-1", 0), ("four-web-2", 0)]
    assert places("four-back") == [("four-web-1", 1), ("four-web-2", 1)]
    assert lab.up(NETS) == []


def test_all_that_up_made_goes_with_the_lab(lab: LabWorld) -> None:
    lab.up(NETS)
    Networks().create(Network("other", "nat", "db-other", SUBNET, made=True))
    lab.stop()
    texts = lab.delete()
    assert texts.index("delete network 'four-lan'") > texts.index(
        next(text for text in texts if "VM 'four-web-1'" in text)
    )
    assert Networks().names() == ["other"]


def test_a_network_that_left_the_file_is_named_and_pruned(lab: LabWorld) -> None:
    lab.up(NETS)
    less = NETS.replace('[net.back]\nmode = "isolated"\n', "").replace(
        '{ net = "back", model = "e1000" }, ', ""
    )
    doings = lab.plan(less)
    assert "network 'four-back'" in doings.left
    done = lab.up(less, prune=True)
    assert done[-1] == "delete network 'four-back'", "after its VMs have left it"
    assert Networks().names() == ["four-lan"]
    assert [net.kind for net in lab.spec("four-web-1").nets] == ["network", "user"]


def test_interfaces_come_go_and_keep_their_addresses(lab: LabWorld) -> None:
    lab.up(NETS)
    before = lab.spec("four-web-1").nets
    first = NETS.replace(
        'nets = ["lan", ', 'nets = [{ net = "lan", address = "192.168.50.9/24" }, '
    )
    first = first.replace("count = 2\n", "count = 1\n")
    assert lab.up(first) == ["change vm.toml of VM 'four-web-1'"]
    after = lab.spec("four-web-1").nets
    assert [net.mac for net in after] == [net.mac for net in before]
    assert (after[0].gateway, after[0].dns) == ("192.168.50.1", ("192.168.50.1",))
    (one, *_) = read_members(Networks(), "four-lan")
    assert str(one.address) == "192.168.50.9"
    none = first.replace(first[first.index("nets = [") :], "nets = []\n")
    lab.up(none)
    assert lab.spec("four-web-1").nets == ()
    assert places("four-lan") == [("four-web-2", 0)], "which is not in the file any more, and stays"


def test_a_vm_that_is_there_gets_a_network_that_is_made_with_it(lab: LabWorld) -> None:
    plain = "[vm.web]\nimage = 'tiny'\n"
    lab.up(plain)
    more = plain + "nets = ['lan']\n[net.lan]\nmode = 'nat'\n"
    assert lab.up(more) == [
        "make network 'four-lan', mode nat, for [net.lan]",
        "change vm.toml of VM 'four-web'",
    ]
    assert places("four-lan") == [("four-web", 0)]
    assert lab.spec("four-web").nets[0].mac != "52:54:00:00:00:00"


def test_a_network_and_a_bridge_that_are_there_are_joined_only(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivebay.net import taps

    monkeypatch.setattr(taps, "check_bridge", lambda name: None)
    Networks().create(Network("office", "nat", "db-office", SUBNET, made=True))
    text = (
        "[net.a]\nnetwork = 'office'\n[net.b]\nbridge = 'br0'\n"
        "[vm.web]\nimage = 'tiny'\nnets = ['a', 'b']\n"
    )
    assert not any("network" in step for step in lab.up(text))
    assert [(net.network, net.bridge) for net in lab.spec("four-web").nets] == [
        ("office", None), (None, "br0"),
    ]  # fmt: skip
    lab.stop()
    lab.delete()
    assert Networks().names() == ["office"]
    assert "there is no network 'nowhere'" in str(refusal(lab, text.replace("office", "nowhere")))


# ---- refused, broken off ------------------------------------------------------------------------


def test_a_network_of_somebody_else_is_not_taken_over(lab: LabWorld) -> None:
    Networks().create(Network("four-lan", "nat", "db-four-lan", SUBNET, made=True))
    error = refusal(lab, NETS)
    assert isinstance(error, AlreadyExists)
    assert "four.toml, line 3: there is a network 'four-lan' already" in str(error)
    assert 'network = "four-lan"' in (error.hint or "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('mode = "nat"', 'mode = "routed"', "has mode nat, and the file says routed"),
        ("50.0/24", "52.0/24", "has subnet 192.168.50.0/24, and the file says 192.168.52.0/24"),
        ('mode = "nat"', 'mode = "nat"\nmtu = 1400', "has mtu None, and the file says 1400"),
    ],
)
def test_a_network_stays_as_it_was_made(lab: LabWorld, old: str, new: str, said: str) -> None:
    lab.up(NETS)
    error = refusal(lab, NETS.replace(old, new, 1))
    assert said in str(error)
    assert "another name in the file" in (error.hint or "")
    assert lab.up(NETS.replace('subnet = "192.168.50.0/24"\n', "")) == []


def test_a_network_is_not_made_anew(lab: LabWorld) -> None:
    lab.up(NETS)
    with pytest.raises(StateError, match="a network is not made anew"):
        lab.plan(None, "net.lan")


def test_only_root_makes_networks(lab: LabWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = refusal(lab, "[net.lan]\nmode = 'nat'\n")
    assert "only root makes networks, and [net.lan] is one of mode nat" in str(error)
    assert "sudo drivebay up" in (error.hint or "")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_beside_a_network_is_mended(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Killed(BaseException):
        pass

    real = Networks.create

    def killed(*words: Any) -> None:
        if when == "after":
            real(*words)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Networks, "create", killed)
        with pytest.raises(Killed):
            lab.up("[net.lan]\nmode = 'nat'\n")
    lab.up("[net.lan]\nmode = 'nat'\n")
    record = Labs().load("four")
    assert record is not None
    assert [thing.finished for thing in record.things.values()] == [True]
    assert lab.delete() == ["delete network 'four-lan'"]
    assert Networks().names() == []


def test_a_network_that_is_gone_is_made_again_and_forgotten(lab: LabWorld) -> None:
    lab.up(NETS)
    Networks().delete("four-back")
    lab.stop()
    assert lab.up(NETS)[0] == "make network 'four-back', mode isolated, for [net.back]"
    Networks().delete("four-back")
    lab.stop()
    lab.delete()
    assert Labs().load("four") is None


def test_a_plain_user_takes_a_network_that_is_made_as_it_is(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up("[net.lan]\nmode = 'nat'\n")
    roots = Networks().folder
    monkeypatch.setattr(lab_networks, "differences", lambda *_: pytest.fail("that is root's"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(lab_networks, "Networks", lambda: Networks(roots))
    assert lab.plan("[net.lan]\nmode = 'nat'\n").plan.texts == []


def test_what_a_network_lacks_is_made(lab: LabWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.up(NETS)
    started = []
    monkeypatch.setattr(lab_networks, "differences", lambda _, network: iter([network]))
    monkeypatch.setattr(lab_networks, "reconcile", lambda _, network: started.append(network.name))
    assert lab.up(NETS) == ["start network 'four-lan'", "start network 'four-back'"]
    assert started == ["four-lan", "four-back"]


# ---- the file -----------------------------------------------------------------------------------

TAKEN = """\
[net.a]
mode = "nat"
subnet = "10.0.0.0/24"
[vm.v]
image = "t"
nets = [{ net = "a", address = "10.0.0.1/24" }]
"""
TWICE = """\
[net.a]
mode = "nat"
[vm.v]
count = 2
image = "t"
nets = [{ net = "a", address = "10.0.0.9/24" }]
"""


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[net.a]\nmode = 'tap'", 2, "'mode' is 'tap', and should be one of user, nat, isolated"),
        ("[net.a]\nmode = 'nat'\nbridge = 'br0'", 3, "has 'mode' and 'bridge'"),
        ("[net.a]\nsubnet = '10.0.0.0/24'", 2, "'subnet' is for a network that 'up' makes"),
        ("[net.a]\nmode = 'nat'\nsubnet = '8.0.0.0/24'", 1, "is not private"),
        ("[net.a]\nmode = 'nat'\nsubnet = 'x'", 3, "'x' is no IPv4 subnet"),
        ("[net.a]\nmode = 'bridge'", 1, "mode bridge needs an uplink"),
        ("[net.a]\nnetwork = 'A B'", 2, "'A B' can't be the name of a network"),
        ("[net.a]\nmode = 'nat'\n[net.A]\nmode = 'nat'", 3, "would be called 'four-a' both"),
        ("[net.a]\nmode='nat'\nsubnet='10.0.0.0/16'\n[net.b]\nmode='nat'\nsubnet='10.0.1.0/24'", 4,
         "have addresses in common: 10.0.1.0/24 and 10.0.0.0/16"),
        ("[net.a]\nmode='nat'\n[vm.v]\nimage='t'\nnets=[{net='a', forward=['1:2']}]", 5,
         "'forward' goes with the kind 'user'"),
        ("[net.a]\n[vm.v]\nimage='t'\nnets=[{net='a', model='x'}]", 4, "'model' is 'x'"),
        (TAKEN, 6, "10.0.0.1 can't be in [net.a]"),
        (TWICE, 6, "'v-1' and 'v-2' have one address"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = tmp_path / "four.toml"
    file.write_text(text)
    with pytest.raises(LabMistake) as caught:
        read_lab(file)
    assert str(caught.value).startswith(f"four.toml, line {line}: ")
    assert said in str(caught.value)


def test_a_name_that_is_too_long_is_made_shorter_and_stays_the_labs() -> None:
    assert network_name("abcdefgh", "lan") == "abcdefgh-lan"
    names = {network_name(lab, "lan") for lab in ("abcdefghi", "abcdefghij")}
    assert len(names) == 2
    assert all(name.startswith("lan-") and len(name) == 8 for name in names)
    assert network_name("Lab", "frontend-network")[:8] == "fronten-"


def test_a_network_that_is_not_there_is_missed_in_a_new_vm(lab: LabWorld) -> None:
    text = "[net.a]\nnetwork = 'nowhere'\n[vm.web]\nimage = 'tiny'\nnets = ['a']\n"
    assert isinstance(refusal(lab, text), NotFound)
