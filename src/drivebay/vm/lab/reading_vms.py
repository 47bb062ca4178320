"""The [vm.X] tables of a lab's file: each becomes one VM, or as many as its count says.

Context: a short-lived process; reads the public keys that a table names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.system.tables import Table
from drivebay.vm.creation import CPUS, MEMORY
from drivebay.vm.identity import new_uuid
from drivebay.vm.images.store import check_image_name
from drivebay.vm.lab.lines import Place
from drivebay.vm.lab.model import Lab, LabNet, LabVm, VmDisk
from drivebay.vm.lab.words import (
    choose_pool,
    keyed,
    located,
    nearest,
    numbered,
    whole_mebibytes,
)
from drivebay.vm.net_file import check_net_keys
from drivebay.vm.public_key import read_public_key
from drivebay.vm.seed import check_cloud_init, check_net
from drivebay.vm.shares import read_share
from drivebay.vm.spec import (
    BUSES,
    DHCP,
    NIC_MODELS,
    Boot,
    CloudInit,
    DiskSpec,
    Forward,
    NetSpec,
    ShareSpec,
    VmSpec,
    check_vm_name,
    read_forward,
)
from drivebay.vm.spec_file import FIRMWARES, read_spec, write_spec
from drivebay.vm.user_net import user_net

__all__ = ["read_vms"]

PORT_MOST: Final = 65535
SECRETS: Final = ("password", "password_hash", "password_file")


def read_vms(
    lab: Lab, group: str, place: Place, table: Table, count: int | None
) -> tuple[LabVm, ...]:
    """The VMs of one table; ``lab`` has all but VMs already. Raises: LabMistake."""
    return _Reader(lab, group, place, table).vms(count)


@dataclass
class _Reader:
    """One table."""

    lab: Lab
    group: str
    place: Place
    table: Table

    def vms(self, count: int | None) -> tuple[LabVm, ...]:
        self._refuse_secrets()
        disks = self._entries("disks")
        nets = self._entries("nets") if "nets" in self.table.values else None
        common = self._common()
        self.table.end()
        if not (common.has_system_disk or common.boot or common.iso or disks):
            raise UsageError(
                f"{self.table.where} has nothing to start from",
                hint='image = "tiny"; or a kernel, an iso, or disks',
            )
        found = []
        for number, name in enumerate(numbered(self.group, count)):
            vm = replace(
                common,
                name=name,
                disks=tuple(self._disk(at, entry, number, count) for at, entry in disks),
                nets=None
                if nets is None
                else tuple(self._net(at, entry, number) for at, entry in nets),
            )
            self._check(vm)
            found.append(vm)
        return tuple(found)

    def _refuse_secrets(self) -> None:
        for key in SECRETS:
            if key in self.table.values:
                raise UsageError(
                    f"{self.table.where}: a lab's file holds no secrets, and so no '{key}'",
                    field=key,
                    hint=f"drivebay vm set {self.lab.full(self.group)} --password",
                )

    def _common(self) -> LabVm:
        """What all VMs of the table share."""
        take = self.table.take
        image, size = take("image", str), self._size("size")
        if image is not None:
            with keyed("image"):
                check_image_name(image)
        named = take("pool", str)
        pool = None
        if image is not None or size is not None:
            pool = choose_pool(self.lab.source, (*self.place, "pool"), named, self.lab.pools)
        elif named is not None:
            raise UsageError(
                f"{self.table.where}: 'pool' says where its system disk lies, and it has none",
                field="pool",
                hint="name an image, or a size",
            )
        user_data, iso = take("user_data", str), take("iso", str)
        return LabVm(
            name=self.group,
            group=self.group,
            place=self.place,
            memory=self._size("memory"),
            cpus=take("cpus", int),
            image=image,
            iso=None if iso is None else self._path(iso),
            pool=pool,
            size=size,
            bus=self.table.one_of("bus", ("", *BUSES), "") or None,
            firmware=self.table.one_of("firmware", ("", *FIRMWARES), "") or None,
            boot=self._boot(),
            qemu=self._qemu(),
            qemu_args=self._texts("qemu_args"),
            shares=self._shares(),
            autostart=take("autostart", bool),
            user=take("user", str),
            ssh_keys=self._keys(),
            packages=self._texts("packages"),
            user_data=None if user_data is None else self._path(user_data),
        )

    def _texts(self, key: str) -> tuple[str, ...] | None:
        return self.table.texts(key) if key in self.table.values else None

    def _size(self, key: str) -> int | None:
        text = self.table.take(key, str)
        with keyed(key):
            return None if text is None else whole_mebibytes(text)

    def _boot(self) -> Boot | None:
        kernel, initrd, append = (self.table.take(key, str) for key in
                                  ("kernel", "initrd", "append"))  # fmt: skip
        if kernel is None:
            for key, value in (("initrd", initrd), ("append", append)):
                if value is not None:
                    raise UsageError(f"{self.table.where}: '{key}' needs a 'kernel'", field=key)
            return None
        return Boot(
            str(self._path(kernel)),
            None if initrd is None else str(self._path(initrd)),
            append or "",
        )

    def _qemu(self) -> str | None:
        named: str | None = self.table.take("qemu", str)
        return str(self._path(named)) if named is not None and "/" in named else named

    def _keys(self) -> tuple[str, ...] | None:
        names = self._texts("ssh_keys")
        with keyed("ssh_keys"):
            return (
                None
                if names is None
                else tuple(read_public_key(self._path(name)) for name in names)
            )

    def _shares(self) -> tuple[ShareSpec, ...] | None:
        """As --share has them: DIRECTORY[:TAG][,ro]."""
        texts = self._texts("shares")
        with keyed("shares"):
            return (
                None
                if texts is None
                else tuple(read_share(str(self._path(text))) for text in texts)
            )

    def _path(self, name: str) -> Path:
        """A file as the lab's file names it, from its folder on."""
        return self.lab.source.path.absolute().parent / name

    # ---- disks and networks ---------------------------------------------------------------------

    def _entries(self, key: str) -> list[tuple[Place, Any]]:
        """The elements of a list, each with its place."""
        return [((*self.place, key, number), entry)
                for number, entry in enumerate(self.table.take(key, list, []))]  # fmt: skip

    def _disk(self, at: Place, entry: Any, number: int, count: int | None) -> VmDisk:
        table = self._entry(at, entry, "disk")
        with located(self.lab.source, at):
            named = table.take("disk", str, required=True)
            bus = table.one_of("bus", ("", *BUSES), "")
            own = table.take("name", str)
            shared = table.take("shared", bool, False)
            table.end()
            disk = self._meant(named, number, count)
            return VmDisk(disk, own or (named if disk != named else disk), shared, bus or None)

    def _meant(self, named: str, number: int, count: int | None) -> str:
        """A disk by its own name; or by that of its table, of which VM N gets number N."""
        names = [disk.name for disk in self.lab.disks]
        groups = {disk.group: disk.parts or 0 for disk in self.lab.disks}
        if named in names:
            return named
        if named not in groups:
            raise UsageError(
                f"there is no [disk.{named[:80]}] in this file",
                field="disk",
                hint=nearest(named, [*groups, *names]),
            )
        many = sum(disk.group == named for disk in self.lab.disks)
        if count is None:
            raise UsageError(
                f"'{named}' means {many} disks, and {self.table.where} is one VM",
                field="disk",
                hint=f"'{named}-1', for one of them",
            )
        if number >= many:
            raise UsageError(
                f"{self.table.where} has {count} VMs, and '{named}' has {many} disks",
                field="disk",
            )
        return f"{named}-{number + 1}"

    def _entry(self, at: Place, entry: Any, key: str) -> Table:
        """A table, or a name that stands for one."""
        if isinstance(entry, str):
            return Table(self.table.where, {key: entry})
        if isinstance(entry, dict):
            return Table(f"{self.table.where}, {key}s", dict(entry))
        raise self.lab.source.mistake(
            at, f"{self.table.where}: '{key}s' should be names, or tables such as "
            f'{{ {key} = "…" }}',
        )  # fmt: skip

    def _net(self, at: Place, entry: Any, number: int) -> NetSpec:
        table = self._entry(at, entry, "net")
        with located(self.lab.source, at):
            named = table.take("net", str, required=True)
            nets = {net.name: net for net in self.lab.nets}
            if named not in nets:
                raise UsageError(
                    f"there is no [net.{named[:80]}] in this file",
                    field="net",
                    hint=nearest(named, nets),
                )
            joined = self._joined(nets[named])
            texts = table.texts("forward")
            with keyed("forward"):
                forward = tuple(_counted(read_forward(text), number) for text in texts)
            net = replace(
                joined,
                forward=forward,
                address=table.take("address", str, DHCP),
                gateway=table.take("gateway", str),
                dns=table.texts("dns"),
                model=table.one_of("model", NIC_MODELS, NIC_MODELS[0]),
            )
            table.end()
            check_net_keys(replace(net, mac=_SOME_MAC), table.where)
            addresses = user_net(NetSpec("user", _SOME_MAC))
            if net.kind == "user" and addresses.has(net.address):
                net = replace(
                    net,
                    gateway=net.gateway or str(addresses.gateway),
                    dns=net.dns or (str(addresses.dns),),
                )
            check_net(net)
            _check_inside(net, nets[named])
            return net

    def _joined(self, net: LabNet) -> NetSpec:
        """An interface in a network of the file, which has no MAC address yet."""
        if net.bridge is not None:
            return NetSpec("bridge", "", bridge=net.bridge)
        network = self.lab.network_name(net.name) if net.is_made else net.network
        return NetSpec("user" if network is None else "network", "", network=network)

    # ---- the whole VM ---------------------------------------------------------------------------

    def _check(self, vm: LabVm) -> None:
        """Refuse what could not be written into vm.toml and read again."""
        full = self.lab.full(vm.name)
        check_vm_name(full)
        cloud_init = CloudInit(
            "none", vm.name, vm.user or "drivebay", vm.ssh_keys or (), None, vm.packages or ()
        )
        check_cloud_init(cloud_init)
        spec = VmSpec(
            full,
            new_uuid(),
            "q35",
            MEMORY if vm.memory is None else vm.memory,
            CPUS if vm.cpus is None else vm.cpus,
            vm.firmware or "bios",
            shares=vm.shares or (),
        )
        self._check_readable(spec)
        names = [*(["system"] if vm.has_system_disk else ()), *(disk.name for disk in vm.disks)]
        with keyed("disks"):
            self._check_readable(
                replace(spec, disks=tuple(DiskSpec(name, "some/disk") for name in names))
            )

    def _check_readable(self, spec: VmSpec) -> None:
        try:
            read_spec(spec.name, write_spec(spec))
        except UsageError as error:
            what = str(error).removeprefix(f"vm.toml of '{spec.name}'")
            what = re.sub(r"^, \[\[disk\]\] \d+", "", what)
            raise UsageError(
                f"{self.table.where}{what}", field=error.field, hint=error.hint
            ) from error


_SOME_MAC: Final = "52:54:00:00:00:01"


def _check_inside(net: NetSpec, lab_net: LabNet) -> None:
    """Raises: UsageError for a static address that is not of the network that the file makes."""
    if net.address == DHCP or lab_net.subnet is None:
        return
    address = IPv4Interface(net.address).ip
    if address not in lab_net.subnet or address == lab_net.subnet[1]:
        raise UsageError(
            f"the address {address} can't be in [net.{lab_net.name}]: its subnet is "
            f"{lab_net.subnet}, of which {lab_net.subnet[1]} is the host's",
            field="address",
        )


def _counted(forward: Forward, number: int) -> Forward:
    """The port of the host counts up with the VMs: web-1 has 2222, web-2 has 2223."""
    port = forward.host_port + number
    if port > PORT_MOST:
        raise UsageError(
            f"forward '{forward}' counts up with the VMs, and would be port {port} in the end"
        )
    return replace(forward, host_port=port)
