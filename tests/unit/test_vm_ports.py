"""vm/ports.py: which port of this host leads where, and which is free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from drivebay.errors import InUse, StateError
from drivebay.vm import ports
from drivebay.vm.ports import check_free, free_forward
from drivebay.vm.spec import Forward, NetSpec
from drivebay.vm.store import Vm
from tests.unit.vm_world import bare


def vm(name: str, *numbers: int) -> Vm:
    nets = tuple(
        NetSpec("user", f"52:54:00:00:00:{number % 100:02}", (Forward(number, 22),))
        for number in numbers
    )
    return Vm(Path(), bare(name, nets=nets), "")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> int:
    """The first of three ports beside each other that nobody has: all that there are."""
    for first in range(20000, 30000, 3):
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                for number, probe in enumerate((a, b, c)):
                    probe.bind(("0.0.0.0", first + number))
            except OSError:
                continue
            break
    monkeypatch.setattr(ports, "_FIRST", first)
    monkeypatch.setattr(ports, "_LAST", first + 3)
    return first


def test_the_first_that_nobody_has(three: int) -> None:
    assert free_forward([], 80) == Forward(three, 80)
    assert free_forward([vm("a", three + 1), vm("b", 1, three)], 80) == Forward(three + 2, 80)
    assert free_forward([vm("a", three)], 80, [Forward(three + 1, 9)]) == Forward(three + 2, 80)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_program_that_listens_has_its_port(three: int, address: str) -> None:
    with socket.create_server((address, three)):
        assert free_forward([], 80).host_port == three + 1


def test_none_is_left(three: int) -> None:
    with pytest.raises(StateError, match=f"no port from {three} to {three + 2} is free") as caught:
        free_forward([vm("a", three, three + 1, three + 2)], 80)
    assert "--forward HOSTPORT:22" in str(caught.value.hint)


def test_a_port_of_another_vm_is_refused_with_a_free_one(three: int) -> None:
    others = [vm("a", 7), vm("b", three)]
    check_free([Forward(three + 1, 80), Forward(three + 2, 80)], others)
    with pytest.raises(InUse, match=f"port {three} leads to VM 'b' already") as caught:
        check_free([Forward(three, 80), Forward(three + 1, 81)], others)
    assert caught.value.hint == f"choose another, such as --forward {three + 2}:80"


def test_a_port_of_udp_is_not_that_of_tcp() -> None:
    check_free([Forward(7, 53), Forward(7, 53, protocol="udp")], [])
    with pytest.raises(InUse, match="port 9 is forwarded twice"):
        check_free(2 * [Forward(9, 53, protocol="udp")], [])


def test_a_port_leads_to_one_place() -> None:
    with pytest.raises(InUse, match="port 9 is forwarded twice"):
        check_free(iter([Forward(9, 22), Forward(9, 80)]), [])
