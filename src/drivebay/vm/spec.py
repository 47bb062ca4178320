"""What a VM is: `vm.toml` as people edit it, and as the tool works with it.

Context: any; looks at no file. Reading checks every key and value, since a person may have
written them. Writing changes only the values that differ, so that comments and order stay
(tomlkit).

    text of vm.toml ── read_spec ──► VmSpec ── replace(...) ──► VmSpec ── write_spec ──► text
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from typing import Any, Final

from drivebay.disks.sizes import format_size, read_size
from drivebay.errors import UsageError

__all__ = [
    "BUSES",
    "DHCP",
    "Boot",
    "CloudInit",
    "DiskSpec",
    "Forward",
    "NetSpec",
    "VmSpec",
    "check_vm_name",
    "read_forward",
    "read_spec",
    "write_spec",
]

BUSES: Final = ("virtio", "scsi", "nvme", "sata")
FIRMWARES: Final = ("bios", "uefi")
DHCP: Final = "dhcp"
CPUS_MOST: Final = 256
MIB: Final = 1 << 20
MEMORY_LEAST: Final = 16 * MIB
UEFI_MEMORY_LEAST: Final = 384 * MIB  # with less it hangs, and says nothing

# A name is a host name (RFC 1123), a folder's and a part of socket names: 63 letters at most,
# and less, since a controller's socket carries it beside the disk's name.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,38}[A-Za-z0-9])?", re.ASCII)
_DISK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)


@dataclass(frozen=True)
class Forward:
    """A TCP port of the host that leads to one of the guest."""

    host_port: int
    guest_port: int
    host_address: str = "127.0.0.1"

    def __str__(self) -> str:
        return f"{self.host_address}:{self.host_port}:{self.guest_port}"


@dataclass(frozen=True)
class DiskSpec:
    """A disk: a bdev of the target, or a qcow2 overlay in the VM's folder that QEMU serves."""

    name: str  # the guest sees it as the serial number
    bdev: str | None = None
    overlay: str | None = None
    made: bool = False  # by us and for this VM alone
    shared: bool = False
    bus: str | None = None  # None: the VM's


@dataclass(frozen=True)
class NetSpec:
    """A network interface."""

    kind: str  # 'user': QEMU's own network behind the host's address
    mac: str
    forward: tuple[Forward, ...] = ()
    address: str = DHCP  # or ADDRESS/PREFIX, which cloud-init sets
    gateway: str | None = None
    dns: tuple[str, ...] = ()


@dataclass(frozen=True)
class CloudInit:
    """What the guest's cloud-init is told."""

    instance_id: str
    hostname: str
    user: str = "drivebay"
    ssh_keys: tuple[str, ...] = ()  # beside the VM's own key
    password_hash: str | None = None  # crypt(5), of `user`
    packages: tuple[str, ...] = ()
    user_data: str | None = None  # a file whose content is used in place of ours


@dataclass(frozen=True)
class Boot:
    """A kernel that QEMU starts itself, instead of the firmware and the system disk."""

    kernel: str
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True)
class VmSpec:
    """One VM. ``name`` is its folder's, all else stands in vm.toml."""

    name: str
    uuid: str
    machine: str  # QEMU's machine type, pinned so that the guest's hardware stays the same
    memory: int  # bytes
    cpus: int
    firmware: str = "bios"
    bus: str = "virtio"
    image: str | None = None
    qemu: str | None = None
    qemu_args: tuple[str, ...] = ()
    boot: Boot | None = None
    disks: tuple[DiskSpec, ...] = ()
    nets: tuple[NetSpec, ...] = ()
    cloud_init: CloudInit | None = None

    def disk(self, name: str) -> DiskSpec | None:
        """The disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)

    def bus_of(self, disk: DiskSpec) -> str:
        """The bus on which the guest sees a disk."""
        return disk.bus or self.bus


def check_vm_name(name: str) -> None:
    """Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name[:80]}' can't be the name of a VM: 1 to 40 letters, digits and '-', "
            "and no '-' at either end",
            hint="the guest gets it as its host name",
        )


def read_forward(text: str) -> Forward:
    """Read 'HOSTPORT:GUESTPORT' or 'ADDRESS:HOSTPORT:GUESTPORT'. Raises: UsageError.

    >>> str(read_forward("2222:22"))
    '127.0.0.1:2222:22'
    """
    address, _, ports = text.rpartition(":")[0].rpartition(":")
    ports = ports + ":" + text.rpartition(":")[2]
    host, _, guest = ports.partition(":")
    if not (_is_port(host) and _is_port(guest)):
        raise UsageError(
            f"'{text[:80]}' is no port forward",
            hint="write HOSTPORT:GUESTPORT, such as 2222:22; both are from 1 to 65535",
        )
    if address and not re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", address, re.ASCII):
        raise UsageError(f"'{address[:80]}' in the forward '{text[:80]}' is no IPv4 address")
    return Forward(int(host), int(guest), address or "127.0.0.1")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 65535


# ---- reading ------------------------------------------------------------------------------------


@dataclass
class _Table:
    """A table of vm.toml whose keys are taken one by one; what is left at the end is unknown."""

    where: str
    values: dict[str, Any]
    known: list[str] = field(default_factory=list)

    def take(self, key: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        self.known.append(key)
        if key not in self.values:
            if required:
                raise UsageError(f"{self.where} has no '{key}'", field=key)
            return default
        value = self.values.pop(key)
        if type(value) is not kind:
            raise UsageError(
                f"{self.where}: '{key}' is {value!r:.80}, and should be {_KINDS[kind]}", field=key
            )
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.take(key, list, [])
        if not all(isinstance(item, str) for item in found):
            raise UsageError(f"{self.where}: '{key}' should be a list of texts", field=key)
        return tuple(found)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = str(self.take(key, str, default))
        if value not in allowed:
            raise UsageError(
                f"{self.where}: '{key}' is '{value[:80]}', and should be one of "
                f"{', '.join(allowed)}",
                field=key,
            )
        return value

    def end(self) -> None:
        if self.values:
            raise UsageError(
                f"{self.where} has a key that is unknown: '{next(iter(self.values))[:80]}'",
                hint=f"known are {', '.join(self.known)}",
            )


_KINDS: Final = {str: "a text", int: "a number", bool: "true or false", list: "a list",
                 dict: "a table"}  # fmt: skip


def read_spec(name: str, text: str) -> VmSpec:
    """Read vm.toml. Raises: UsageError, naming what is wrong."""
    try:
        top = _Table(f"vm.toml of '{name}'", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"vm.toml of '{name}' is not TOML: {error}") from error
    memory = read_size(top.take("memory", str, required=True))
    cpus = top.take("cpus", int, required=True)
    if memory < MEMORY_LEAST or memory % MIB:
        raise UsageError(f"{top.where}: 'memory' should be whole MiB, at least 16M", field="memory")
    if not 1 <= cpus <= CPUS_MOST:
        raise UsageError(f"{top.where}: 'cpus' should be from 1 to {CPUS_MOST}", field="cpus")
    spec = VmSpec(
        name=name,
        uuid=top.take("uuid", str, required=True),
        machine=top.take("machine", str, required=True),
        memory=memory,
        cpus=cpus,
        firmware=top.one_of("firmware", FIRMWARES, "bios"),
        bus=top.one_of("bus", BUSES, "virtio"),
        image=top.take("image", str),
        qemu=top.take("qemu", str),
        qemu_args=top.texts("qemu_args"),
        boot=_read_boot(top),
        disks=tuple(_read_disk(table) for table in _tables(top, "disk")),
        nets=tuple(_read_net(table) for table in _tables(top, "net")),
        cloud_init=_read_cloud_init(top),
    )
    top.end()
    if spec.firmware == "uefi" and memory < UEFI_MEMORY_LEAST:
        raise UsageError(
            f"{top.where}: UEFI needs {format_size(UEFI_MEMORY_LEAST)} of 'memory', and there is "
            f"{format_size(memory)}",
            field="memory",
        )
    names = [disk.name for disk in spec.disks]
    if len(set(names)) < len(names):
        raise UsageError(f"{top.where} has two disks of one name: {', '.join(sorted(names))}")
    return spec


def _tables(top: _Table, key: str) -> list[_Table]:
    found = top.take(key, list, [])
    if not all(isinstance(item, dict) for item in found):
        raise UsageError(f"{top.where}: write [[{key}]] for each '{key}'", field=key)
    return [_Table(f"{top.where}, [[{key}]] {number + 1}", dict(item))
            for number, item in enumerate(found)]  # fmt: skip


def _read_boot(top: _Table) -> Boot | None:
    found = top.take("boot", dict)
    if found is None:
        return None
    table = _Table(f"{top.where}, [boot]", dict(found))
    boot = Boot(
        kernel=table.take("kernel", str, required=True),
        initrd=table.take("initrd", str),
        append=table.take("append", str, ""),
    )
    table.end()
    return boot


def _read_disk(table: _Table) -> DiskSpec:
    bus = table.one_of("bus", ("", *BUSES), "")
    disk = DiskSpec(
        name=table.take("name", str, required=True),
        bdev=table.take("bdev", str),
        overlay=table.take("overlay", str),
        made=table.take("made", bool, False),
        shared=table.take("shared", bool, False),
        bus=bus or None,
    )
    table.end()
    if not _DISK_NAME.fullmatch(disk.name):
        raise UsageError(
            f"{table.where}: '{disk.name[:80]}' can't be the name of a disk: 1 to 20 letters, "
            "digits, '-' and '_', since the guest gets it as a serial number"
        )
    if (disk.bdev is None) == (disk.overlay is None):
        raise UsageError(f"{table.where} needs either 'bdev' or 'overlay'")
    if disk.overlay is not None and ("/" in disk.overlay or disk.overlay.startswith(".")):
        raise UsageError(f"{table.where}: 'overlay' should be a file's name in the VM's folder")
    return disk


def _read_net(table: _Table) -> NetSpec:
    net = NetSpec(
        kind=table.one_of("kind", ("user",), "user"),
        mac=table.take("mac", str, required=True).lower(),
        forward=tuple(read_forward(text) for text in table.texts("forward")),
        address=table.take("address", str, DHCP),
        gateway=table.take("gateway", str),
        dns=table.texts("dns"),
    )
    table.end()
    if not _MAC.fullmatch(net.mac) or int(net.mac[:2], 16) & 1:
        raise UsageError(
            f"{table.where}: '{net.mac[:80]}' is no MAC address of one interface",
            hint="such as 52:54:00:12:34:56",
        )
    return net


def _read_cloud_init(top: _Table) -> CloudInit | None:
    found = top.take("cloud_init", dict)
    if found is None:
        return None
    table = _Table(f"{top.where}, [cloud_init]", dict(found))
    cloud_init = CloudInit(
        instance_id=table.take("instance_id", str, required=True),
        hostname=table.take("hostname", str, top_name(top)),
        user=table.take("user", str, "drivebay"),
        ssh_keys=table.texts("ssh_keys"),
        password_hash=table.take("password_hash", str),
        packages=table.texts("packages"),
        user_data=table.take("user_data", str),
    )
    table.end()
    return cloud_init


def top_name(top: _Table) -> str:
    """The VM's name, which a guest gets as its host name unless it is told another."""
    return top.where.partition("'")[2].rstrip("'")


# ---- writing ------------------------------------------------------------------------------------


def write_spec(spec: VmSpec, before: str = "") -> str:
    """Return the text of vm.toml; ``before`` is the present one, whose comments stay."""
    import tomlkit  # only here: a start only reads

    document = tomlkit.parse(before)
    _merge(document, _as_table(spec))
    return tomlkit.dumps(document)


def _as_table(spec: VmSpec) -> dict[str, Any]:
    boot, cloud_init = spec.boot, spec.cloud_init
    return _without_defaults(
        {
            "uuid": spec.uuid,
            "machine": spec.machine,
            "memory": _spell_memory(spec.memory),
            "cpus": spec.cpus,
            "firmware": spec.firmware,
            "bus": spec.bus,
            "image": spec.image,
            "qemu": spec.qemu,
            "qemu_args": list(spec.qemu_args),
            "boot": None if boot is None else _without_defaults(dict(vars(boot))),
            "disk": [_without_defaults(dict(vars(disk))) for disk in spec.disks],
            "net": [
                _without_defaults(
                    {**vars(net), "forward": [str(forward) for forward in net.forward],
                     "dns": list(net.dns)}
                )
                for net in spec.nets
            ],
            "cloud_init": None
            if cloud_init is None
            else _without_defaults(
                {**vars(cloud_init), "ssh_keys": list(cloud_init.ssh_keys),
                 "packages": list(cloud_init.packages)}
            ),
        }
    )  # fmt: skip


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Absent, empty and false mean the same in vm.toml, and are not written."""
    return {
        key: value
        for key, value in values.items()
        if value is not False and value not in (None, [], "")
    }


def _spell_memory(memory: int) -> str:
    """A size that `read_size` reads back exactly."""
    for unit, scale in (("G", 1 << 30), ("M", MIB)):
        if memory % scale == 0:
            return f"{memory // scale}{unit}"
    raise UsageError(f"{format_size(memory)} of memory is no whole number of MiB")


def _merge(present: Any, wanted: dict[str, Any]) -> None:
    """Make a tomlkit table hold ``wanted``, and leave alone what is so already."""
    for key in [key for key in present if key not in wanted]:
        del present[key]
    for key, value in wanted.items():
        there = present.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and there:
            present[key] = _merged_tables(there, value)
        elif key == "memory" and there is not None and read_size(there) == read_size(value):
            continue  # another spelling of the same size
        elif there is None or _plain(there) != value:
            present[key] = value


def _merged_tables(present: Any, wanted: list[dict[str, Any]]) -> Any:
    """The tables of [[disk]] or [[net]]: those that stay keep their comments."""
    import tomlkit

    by_key = {_key_of(table): table for table in present}
    tables = tomlkit.aot()
    for values in wanted:
        table = by_key.get(_key_of(values))
        if table is None:
            table = tomlkit.table()
        _merge(table, values)
        tables.append(table)
    return tables


def _key_of(table: dict[str, Any]) -> str:
    return str(table.get("name") or table.get("mac"))


def _plain(value: Any) -> Any:
    return value.unwrap() if hasattr(value, "unwrap") else value
