"""One VM: would it start, and is what runs what its vm.toml says?

Context: a short-lived process; changes nothing, and starts only QEMU's probe.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator

from drivebay.disks.inventory import Inventory
from drivebay.errors import DrivebayError
from drivebay.host.finding import Finding, failed
from drivebay.host.resources import available_memory, memory_finding
from drivebay.host.storage import look
from drivebay.vm import run
from drivebay.vm.disks import check_writers
from drivebay.vm.joining import check_joins
from drivebay.vm.lifecycle import check_able, check_cd, check_image
from drivebay.vm.qemu import find_qemu
from drivebay.vm.stillness import refuse_half_reverted
from drivebay.vm.store import Vm, Vms

__all__ = ["check_machine"]


def check_machine(vms: Vms, name: str, named_socket: str | None) -> Iterator[Finding]:
    """Check a VM by its name. Raises: NotFound when there is none of that name."""
    try:
        vm = vms.load(name)
    except DrivebayError as error:
        if name not in vms.names():
            raise
        yield failed("vm.toml", error)
        return
    yield Finding("ok", "vm.toml", f"{vm.folder / 'vm.toml'} can be read")
    yield from _check_revert(vm)
    yield from _check_secrets(vm)
    yield _attempt("qemu", lambda: _check_qemu(vm))
    yield _attempt("image", lambda: _check_image(vm))
    if vm.spec.iso is not None:
        yield _attempt("iso", lambda: _check_iso(vm))
    inventory, findings = look(named_socket)
    yield from findings
    if inventory is not None:
        yield from _check_disks(vm, vms, inventory)
    found = run.running(vm)
    if found is None:
        yield memory_finding(vm, available_memory())
        yield from _check_ports(vm)
        yield from _check_nets(vm)
    else:
        yield from _check_running(vm, found)


def _check_revert(vm: Vm) -> Iterator[Finding]:
    try:
        refuse_half_reverted(vm)
    except DrivebayError as error:
        yield failed("snapshots", error)


def _attempt(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", subject, check())
    except DrivebayError as error:
        return failed(subject, error)


def _check_qemu(vm: Vm) -> str:
    qemu = find_qemu(vm.spec.qemu)
    check_able(vm, qemu)
    return f"QEMU {qemu.spelled_version} at {qemu.path} has all that it needs"


def _check_image(vm: Vm) -> str:
    check_image(vm)
    if vm.spec.image is None:
        return "it was made from none"
    return f"'{vm.spec.image}' is as it was"


def _check_iso(vm: Vm) -> str:
    check_cd(vm)
    return f"'{vm.spec.iso}' is in its CD drive"


def _check_secrets(vm: Vm) -> Iterator[Finding]:
    """Keys, passwords and the monitor are nobody else's."""
    open_ones = []
    for path in (vm.folder, *sorted(vm.folder.rglob("*"))):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue  # a file of a moment, such as a seed that takes its place
        public = path.suffix in (".pub", ".log", ".1")
        if not public and not stat.S_ISLNK(mode) and mode & 0o077:
            open_ones.append(path)
    if open_ones and vm.folder in open_ones:
        listed = ", ".join(str(path.relative_to(vm.folder.parent)) for path in open_ones[:3])
        yield Finding(
            "warning",
            "secrets",
            f"other users may look at {listed}, where keys and passwords are",
            f"chmod -R go= {vm.folder}",
        )
    else:
        yield Finding("ok", "secrets", f"{vm.folder} is closed to other users")


def _check_disks(vm: Vm, vms: Vms, inventory: Inventory) -> Iterator[Finding]:
    everybody = [*vms.others(vm.name), vm]
    for disk in vm.spec.disks:
        if disk.bdev is None:
            path = vm.folder / (disk.overlay or "")
            if not path.is_file():
                yield Finding("problem", "disks", f"disk '{disk.name}': '{path}' is not there")
            continue
        try:
            there = inventory.disk(disk.bdev)
            check_writers(vm.name, disk, inventory, everybody)
        except DrivebayError as error:
            yield failed("disks", error)
        else:
            sharing = "shared" if disk.shared else "nobody else's"
            yield Finding("ok", "disks", f"disk '{disk.name}' is {there.reference}, {sharing}")


def _check_ports(vm: Vm) -> Iterator[Finding]:
    """Each port must be free, and above 1023 for QEMU, which is not root."""
    wanted = [
        (
            forward.protocol,
            forward.host_address,
            forward.host_port,
            f"--forward {'udp:' * (forward.protocol == 'udp')}PORT:{forward.guest_port}",
        )
        for net in vm.spec.nets
        for forward in net.forward
    ]
    if vm.spec.vnc is not None:
        wanted.append(
            ("tcp", vm.spec.vnc.address, vm.spec.vnc.port, f"--vnc {vm.spec.vnc.address}:PORT")
        )
    for protocol, address, port, option in wanted:
        problem = _port_problem(protocol, address, port)
        mend = f"drivebay vm set {vm.name} {option}"
        if problem is None:
            yield Finding("ok", "ports", f"port {port} is free")
        elif problem == errno.EADDRINUSE:
            who = f"ss -ltnp 'sport = :{port}'"
            what = f"another program listens at port {port} of this host"
            yield Finding("problem", "ports", what, f"{who}; {mend}")
        else:
            what = f"port {port} can't be used: {os.strerror(problem)}"
            yield Finding("problem", "ports", what, mend)


def _check_nets(vm: Vm) -> Iterator[Finding]:
    """Each network and bridge is there, and may be joined; scripts can be run."""
    for net in vm.spec.nets:
        if net.kind == "user":
            continue
        joins = net.network or net.bridge or net.ifname
        try:
            check_joins((net,))
        except DrivebayError as error:
            yield failed("networks", error)
        else:
            yield Finding("ok", "networks", f"its interface can join {net.kind} '{joins}'")


def _port_problem(protocol: str, address: str, port: int) -> int | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    stream = protocol == "tcp"
    with socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(stream))
        try:
            trial.bind((address, port))
        except OSError as error:
            return error.errno or errno.EINVAL
    return None


def _check_running(vm: Vm, found: run.Running) -> Iterator[Finding]:
    try:
        with run.monitor(vm, 5.0) as monitor:
            state = monitor.call("query-status")["status"]
    except DrivebayError as error:
        yield failed("process", error)
    else:
        yield Finding("ok", "process", f"process {found.pid} runs by {found.accelerator}: {state}")
    if found.text != vm.text:
        yield Finding(
            "note",
            "process",
            "vm.toml was changed since the start",
            f"drivebay vm restart {vm.name}",
        )
