"""vm.toml: its text from and to a VmSpec.

Context: any; looks at no file. Reading checks every key and value, since a person may have
written them. Writing changes only the values that differ, so that comments and order stay
(tomlkit).

    text of vm.toml ── read_spec ──► VmSpec ── replace(...) ──► VmSpec ── write_spec ──► text
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final

from drivebay.disks.sizes import format_size, read_size
from drivebay.errors import UsageError
from drivebay.system.tables import Table
from drivebay.vm.net_file import net_values, read_net
from drivebay.vm.spec import (
    BUSES,
    Boot,
    CloudInit,
    DiskSpec,
    ShareSpec,
    VmSpec,
    VncSpec,
)
from drivebay.vm.vnc import check_vnc

__all__ = ["read_spec", "write_spec"]

FIRMWARES: Final = ("bios", "uefi")
CPUS_MOST: Final = 256
NETS_MOST: Final = 8  # each has a slot of its own on the machine's first bus
MIB: Final = 1 << 20
MEMORY_LEAST: Final = 16 * MIB
UEFI_MEMORY_LEAST: Final = 384 * MIB  # with less it hangs, and says nothing
_DISK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,35}", re.ASCII)  # virtio 1.2, 5.11.4: 36 bytes


# ---- reading ------------------------------------------------------------------------------------


def read_spec(name: str, text: str) -> VmSpec:
    """Read vm.toml. Raises: UsageError, naming what is wrong."""
    try:
        top = Table(f"vm.toml of '{name}'", tomllib.loads(text))
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
        iso=top.take("iso", str),
        autostart=top.take("autostart", bool, False),
        lab=top.take("lab", str),
        qemu=top.take("qemu", str),
        qemu_args=top.texts("qemu_args"),
        boot=_read_boot(top),
        disks=tuple(_read_disk(table) for table in _tables(top, "disk")),
        nets=tuple(read_net(table) for table in _tables(top, "net")),
        shares=tuple(_read_share(table) for table in _tables(top, "share")),
        vnc=_read_vnc(top),
        cloud_init=_read_cloud_init(top),
    )
    top.end()
    if spec.firmware == "uefi" and memory < UEFI_MEMORY_LEAST:
        raise UsageError(
            f"{top.where}: UEFI needs {format_size(UEFI_MEMORY_LEAST)} of 'memory', and there is "
            f"{format_size(memory)}",
            field="memory",
        )
    if spec.iso is not None and not spec.iso.startswith("/"):
        raise UsageError(f"{top.where}: 'iso' is '{spec.iso[:80]}', and should begin with '/'")
    if len(spec.nets) > NETS_MOST:
        raise UsageError(f"{top.where} has {len(spec.nets)} interfaces; the most are {NETS_MOST}")
    for what, names in (
        ("disks of one name", [disk.name for disk in spec.disks]),
        ("shares of one tag", [share.tag for share in spec.shares]),
        ("interfaces of one MAC address", [net.mac for net in spec.nets]),
    ):
        if len(set(names)) < len(names):
            raise UsageError(f"{top.where} has two {what}: {', '.join(sorted(names))}")
    return spec


def _tables(top: Table, key: str) -> list[Table]:
    found = top.take(key, list, [])
    if not all(isinstance(item, dict) for item in found):
        raise UsageError(f"{top.where}: write [[{key}]] for each '{key}'", field=key)
    return [Table(f"{top.where}, [[{key}]] {number + 1}", dict(item))
            for number, item in enumerate(found)]  # fmt: skip


def _read_boot(top: Table) -> Boot | None:
    found = top.take("boot", dict)
    if found is None:
        return None
    table = Table(f"{top.where}, [boot]", dict(found))
    boot = Boot(
        kernel=table.take("kernel", str, required=True),
        initrd=table.take("initrd", str),
        append=table.take("append", str, ""),
    )
    table.end()
    return boot


def _read_disk(table: Table) -> DiskSpec:
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


def _read_share(table: Table) -> ShareSpec:
    share = ShareSpec(
        directory=table.take("directory", str, required=True),
        tag=table.take("tag", str, required=True),
        read_only=table.take("read_only", bool, False),
    )
    table.end()
    if not share.directory.startswith("/"):
        raise UsageError(
            f"{table.where}: 'directory' is '{share.directory[:80]}', and should begin with '/'"
        )
    if not _TAG.fullmatch(share.tag):
        raise UsageError(
            f"{table.where}: '{share.tag[:80]}' can't be a tag: 1 to 36 letters, digits, '.', "
            "'-' and '_'"
        )
    return share


def _read_vnc(top: Table) -> VncSpec | None:
    found = top.take("vnc", dict)
    if found is None:
        return None
    table = Table(f"{top.where}, [vnc]", dict(found))
    vnc = VncSpec(
        address=table.take("address", str, "127.0.0.1"),
        port=table.take("port", int, required=True),
        password_file=table.take("password_file", str),
        tls=table.take("tls", str),
    )
    table.end()
    check_vnc(vnc, table.where)
    return vnc


def _read_cloud_init(top: Table) -> CloudInit | None:
    found = top.take("cloud_init", dict)
    if found is None:
        return None
    table = Table(f"{top.where}, [cloud_init]", dict(found))
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


def top_name(top: Table) -> str:
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
    boot, cloud_init, vnc = spec.boot, spec.cloud_init, spec.vnc
    return _without_defaults(
        {
            "uuid": spec.uuid,
            "machine": spec.machine,
            "memory": _spell_memory(spec.memory),
            "cpus": spec.cpus,
            "firmware": spec.firmware,
            "bus": spec.bus,
            "image": spec.image,
            "iso": spec.iso,
            "autostart": spec.autostart,
            "lab": spec.lab,
            "qemu": spec.qemu,
            "qemu_args": list(spec.qemu_args),
            "boot": None if boot is None else _without_defaults(dict(vars(boot))),
            "disk": [_without_defaults(dict(vars(disk))) for disk in spec.disks],
            "net": [_without_defaults(net_values(net)) for net in spec.nets],
            "share": [_without_defaults(dict(vars(share))) for share in spec.shares],
            "vnc": None if vnc is None else _without_defaults(dict(vars(vnc))),
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
    """The tables of [[disk]], [[net]] or [[share]]: those that stay keep their comments."""
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
    return str(table.get("name") or table.get("mac") or table.get("tag"))


def _plain(value: Any) -> Any:
    return value.unwrap() if hasattr(value, "unwrap") else value
