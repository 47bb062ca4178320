"""A VM's interfaces at its start: TAPs are opened, put where they belong, and handed to QEMU.

Context: a short-lived process that holds the VM's lock. QEMU is sandboxed and has no rights: it
gets descriptors, and scripts are run by us. Nobody of ours is there when a guest ends by itself,
so what a downscript has to do then is written down, and done by the next command that stops,
starts or deletes the VM.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pwd
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Interface
from typing import TYPE_CHECKING, Final

from drivebay.errors import DrivebayError, NotFound, StateError
from drivebay.system.files import refusal, write_private
from drivebay.vm.hardware import OpenTap
from drivebay.vm.spec import DHCP, NetSpec

if TYPE_CHECKING:
    from drivebay.disks.plan import Plan
    from drivebay.net.model import Network
    from drivebay.net.taps import Tap
    from drivebay.vm.run import Descriptors
    from drivebay.vm.store import Vm

__all__ = [
    "bridge_of",
    "check_joins",
    "join",
    "leave",
    "load_network",
    "plan_downscripts",
    "wanted_address",
]

_LEFT: Final = "downscripts.json"


def load_network(name: str) -> Network:
    """A named network that this user may join. Raises: NotFound, StateError, UsageError."""
    from drivebay.net.bridge_helper import how_to_allow
    from drivebay.net.store import Networks

    try:
        network = Networks().load(name)
    except NotFound as error:
        near = difflib.get_close_matches(name, ("user", "none", "tap", "bridge"), 1)
        error.hint = f"is '{near[0]}' meant? {error.hint}" if near else error.hint
        raise
    user = pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() != 0 and user not in network.allow_users:
        raise StateError(
            f"user '{user}' may not join network '{name}'",
            hint=how_to_allow(name, user),
        )
    return network


def bridge_of(net: NetSpec) -> str:
    """The bridge in which an interface of kind 'network' or 'bridge' is. Raises: NotFound."""
    if net.network is None:
        assert net.bridge is not None
        return net.bridge
    from drivebay.net.store import Networks

    return Networks().load(net.network).bridge


def check_joins(nets: tuple[NetSpec, ...]) -> None:
    """Refuse, before anything is made, interfaces that can't join what they should.

    Raises: NotFound, StateError, UsageError, HostError.
    """
    from drivebay.net import scripts
    from drivebay.net.taps import check_bridge

    for net in nets:
        if net.network is not None:
            load_network(net.network)
        elif net.bridge is not None:
            check_bridge(net.bridge)
        for path in filter(None, (net.script, net.downscript)):
            scripts.check(path)


def join(vm: Vm, descriptors: Descriptors, stack: ExitStack) -> dict[str, OpenTap]:
    """Open the TAPs of a VM, by MAC address; what is not QEMU's when ``stack`` ends is taken back.

    Raises: DrivebayError of many kinds.
    """
    _give_back(vm)
    found = {}
    for index, net in enumerate(vm.spec.nets):
        if net.kind == "user":
            continue
        tap = _open(vm, net, index, stack)
        for descriptor in (*tap.descriptors, *tap.vhost):
            descriptors.inherit(descriptor)
        found[net.mac] = OpenTap(tap.descriptors, tap.vhost)
    return found


def _give_back(vm: Vm) -> None:
    """The places of interfaces that it has no more, but had while it ran."""
    if os.geteuid() != 0:
        return
    from drivebay.net.members import give_back
    from drivebay.net.store import Networks

    kept = [(net.network, net.mac) for net in vm.spec.nets if net.network is not None]
    give_back(Networks(), vm.name, kept)


def _open(vm: Vm, net: NetSpec, index: int, stack: ExitStack) -> Tap:
    from drivebay.net.bridge_helper import tap_by_helper
    from drivebay.net.taps import QUEUES_MOST, alias_of, open_tap

    queues = 1 if net.model == "e1000" else min(vm.spec.cpus, QUEUES_MOST)
    alias = alias_of(vm.name, index)
    if net.kind == "tap":
        return _open_named(vm, net, queues, alias, stack)
    mtu = None
    if net.network is not None:
        network = load_network(net.network)
        mtu = network.mtu
        if os.geteuid() == 0:
            _prepare(network, vm, net, index)
    if os.geteuid() != 0:
        return tap_by_helper(bridge_of(net))
    return open_tap(bridge_of(net), queues=queues, alias=alias, mtu=mtu)


def _prepare(network: Network, vm: Vm, net: NetSpec, index: int) -> None:
    """What a reboot or a half-done change has left away, and the VM's place."""
    from drivebay.net.members import keep
    from drivebay.net.reconcile import reconcile
    from drivebay.net.store import Networks

    networks = Networks()
    reconcile(networks, network)
    keep(networks, network.name, vm.name, index, net.mac, wanted_address(net))


def wanted_address(net: NetSpec) -> IPv4Address | None:
    """The static address of an interface, whose network must not give it to another one."""
    return None if net.address == DHCP else IPv4Interface(net.address).ip


# ---- TAPs and scripts of a person's own ---------------------------------------------------------


def _open_named(vm: Vm, net: NetSpec, queues: int, alias: str, stack: ExitStack) -> Tap:
    from drivebay.net import scripts
    from drivebay.net.taps import exists, open_named_tap, set_persistent

    assert net.ifname is not None
    made = not exists(net.ifname)
    tap = open_named_tap(net.ifname, queues=queues, alias=alias)
    try:
        if net.downscript is not None:
            _note(vm, [*_noted(vm), (net.ifname, net.downscript, made)])
            stack.push(lambda kind, error, trace: _after_failure(vm, error))
            if made:  # so that the downscript finds what the script did to it
                set_persistent(tap, True)
        if net.script is not None:
            scripts.run(net.script, net.ifname, vm.name)
    except BaseException:
        tap.close()
        raise
    return tap


def _after_failure(vm: Vm, error: BaseException | None) -> None:
    if error is not None:
        with contextlib.suppress(DrivebayError):  # what made the start fail is said
            leave(vm)


def leave(vm: Vm) -> None:
    """After a VM's end: run the downscripts that are due, each once. Raises: as `scripts.run`."""
    from drivebay.net import scripts
    from drivebay.net.taps import open_named_tap, set_persistent

    while noted := _noted(vm):
        (ifname, downscript, made), *left = noted
        try:
            scripts.run(downscript, ifname, vm.name)
        except DrivebayError as error:
            error.hint = f"{error.hint or ''}   (it is not run again)".strip()
            raise
        finally:
            if made:
                tap = open_named_tap(ifname, queues=1, alias="")
                set_persistent(tap, False)
                tap.close()
            _note(vm, left)


def plan_downscripts(plan: Plan, vm: Vm) -> None:
    """Run what is due when a VM has ended, before it is deleted."""
    for ifname, downscript, _ in _noted(vm):
        plan.add(f"run '{downscript}' for {ifname}", lambda: leave(vm))


def _noted(vm: Vm) -> list[tuple[str, str, bool]]:
    """(interface, downscript, whether the interface is ours)."""
    try:
        found = json.loads((vm.folder / _LEFT).read_text(encoding="utf-8"))
        return [(str(ifname), str(script), bool(made)) for ifname, script, made in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise refusal("can't read", vm.folder / _LEFT, error) from error


def _note(vm: Vm, noted: list[tuple[str, str, bool]]) -> None:
    if noted:
        write_private(vm.folder / _LEFT, json.dumps(noted).encode())
    else:
        (vm.folder / _LEFT).unlink(missing_ok=True)
