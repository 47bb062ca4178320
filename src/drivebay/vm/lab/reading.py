"""A lab's file, from its text to a Lab; every mistake in it is told with its line.

Context: a short-lived process; reads the file and the public keys that it names, asks no target.

    text ── tomllib ──► tables ── here, key by key ──► pools, disks, VMs ── checking ──► Lab
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

from drivebay.disks.making import PARTS_MOST
from drivebay.errors import HostError, UsageError
from drivebay.net.model import (
    MODES,
    Network,
    bridge_name,
    check_network,
    check_network_name,
    read_subnet,
)
from drivebay.system.tables import Table
from drivebay.vm.lab.checking import check_lab
from drivebay.vm.lab.lines import Place, lines_of
from drivebay.vm.lab.model import (
    USER_MODE,
    Lab,
    LabDisk,
    LabMistake,
    LabNet,
    LabPool,
    LabVm,
    Source,
    network_name,
)
from drivebay.vm.lab.reading_vms import read_vms
from drivebay.vm.lab.words import choose_pool, keyed, located, numbered, whole_mebibytes

__all__ = ["lab_name_of", "read_lab"]

COUNT_MOST: Final = 256
_BYTES_MOST: Final = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", re.ASCII)
_LAB_NAME_MOST: Final = 20
_SOME_SUBNET: Final = IPv4Network("192.168.0.0/24")


def read_lab(path: Path) -> Lab:
    """Read a lab's file. Raises: LabMistake with the line; HostError."""
    text = _text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, error) from error
    reader = _Reader(Source(path, lines_of(text)))
    return reader.lab(values)


def lab_name_of(path: Path) -> str:
    """The name of a file's lab, whatever else is wrong in it. Raises: LabMistake, HostError."""
    try:
        values = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, error) from error
    name = values.get("name", _default_name(path))
    return name if isinstance(name, str) else _default_name(path)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _BYTES_MOST:
            raise UsageError(f"'{path}' is too long for a lab's file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is no text in UTF-8") from error
    except OSError as error:
        raise HostError(
            f"can't read the lab's file '{path}'",
            error.errno or 0,
            path=str(path),
            hint="a lab is described by a file: drivebay up FILE",
        ) from error


def _no_toml(path: Path, error: tomllib.TOMLDecodeError) -> LabMistake:
    """The reader's words end in '(at line 3, column 5)', or '(at end of document)'."""
    what, _, where = str(error).rpartition(" (at ")
    line = re.match(r"line (\d+)", where)
    at = f"line {line[1]}" if line else "at its end"
    twice = re.match(r"Cannot declare \('(\w+)', '([^']*)'\) twice", what)
    if twice:
        return LabMistake(f"{path.name}, {at}: [{twice[1]}.{twice[2]}] is there twice")
    if what == "Cannot overwrite a value":
        return LabMistake(f"{path.name}, {at}: a key is there twice")
    return LabMistake(f"{path.name}, {at}: this is no TOML: {what or error}")


def _default_name(path: Path) -> str:
    """The file's name without its ending; that of its folder for a lab.toml."""
    path = path.absolute()
    return path.parent.name if path.name == "lab.toml" else path.stem


class _Reader:
    """The tables of one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.folder = source.path.absolute().parent
        self.name = ""

    def lab(self, values: dict[str, Any]) -> Lab:
        with located(self.source, ()):
            top = Table("the file", values)
            name = self.name = self._name(top.take("name", str))
            found = {key: top.take(key, dict, {}) for key in ("pool", "disk", "net", "vm")}
            top.end()
        tables = {
            kind: list(self._tables(kind, each)) for kind, each in found.items()
        }  # in the file's order
        pools = tuple(self._pool(*table) for table in tables["pool"])
        disks = tuple(disk for table in tables["disk"] for disk in self._disks(*table, pools))
        nets = tuple(self._net(*table) for table in tables["net"])
        vms: tuple[LabVm, ...] = ()
        lab = Lab(name, self.source, pools, disks, nets)
        for label, place, table in tables["vm"]:
            with located(self.source, place):
                count = self._count(table, place)
                vms += read_vms(lab, label, place, table, count)
        lab = replace(lab, vms=vms)
        if not (pools or disks or nets or vms):
            raise self.source.mistake((), "the lab is empty", hint="[vm.web] describes a VM")
        check_lab(lab)
        return lab

    def _name(self, named: str | None) -> str:
        name = _default_name(self.source.path) if named is None else named
        if not _NAME.fullmatch(name) or len(name) > _LAB_NAME_MOST:
            proposal = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:_LAB_NAME_MOST].strip("-")
            origin = "" if named is not None else ", which the file's place gives it,"
            raise UsageError(
                f"the lab's name '{name[:80]}'{origin} should be 1 to {_LAB_NAME_MOST} letters, "
                "digits and '-', and no '-' at either end",
                field="name",
                hint=f'name = "{proposal or "lab"}"',
            )
        return name

    def _tables(self, kind: str, found: dict[str, Any]) -> Iterator[tuple[str, Place, Table]]:
        for name, values in found.items():
            place: Place = (kind, name)
            if not isinstance(values, dict):
                raise self.source.mistake(
                    place, f"'{name[:80]}' below [{kind}] should be a table",
                    hint=f"write [{kind}.{name}]",
                )  # fmt: skip
            if not _NAME.fullmatch(name):
                raise self.source.mistake(
                    place,
                    f"'{name[:80]}' can't be the name of a {kind}: letters, digits and '-', and "
                    "no '-' at either end",
                )
            yield name, place, Table(f"[{kind}.{name}]", dict(values))

    def _count(self, table: Table, place: Place) -> int | None:
        count: int | None = table.take("count", int)
        if count is not None and not 1 <= count <= COUNT_MOST:
            raise self.source.mistake(
                (*place, "count"), f"{table.where}: 'count' is {count}, and should be from 1 to "
                f"{COUNT_MOST}",
            )  # fmt: skip
        return count

    def _size(self, table: Table) -> int | None:
        text = table.take("size", str)
        with keyed("size"):
            return None if text is None else whole_mebibytes(text)

    # ---- pools and disks ------------------------------------------------------------------------

    def _pool(self, name: str, place: Place, table: Table) -> LabPool:
        with located(self.source, place):
            file, device = table.take("file", str), table.take("device", str)
            size = self._size(table)
            table.end()
            if (file is None) == (device is None):
                raise UsageError(
                    f"{table.where} needs either 'file' or 'device'",
                    hint='such as file = "big.img" and size = "300G"',
                )
            if device is not None and not device.startswith("/"):
                raise UsageError(f"{table.where}: 'device' should begin with '/'", field="device")
            return LabPool(name, place, None if file is None else self.folder / file, device, size)

    def _disks(
        self, name: str, place: Place, table: Table, pools: tuple[LabPool, ...]
    ) -> Iterator[LabDisk]:
        with located(self.source, place):
            count = self._count(table, place)
            kinds = {key: table.take(key, str) for key in ("pool", "file", "split")}
            size = self._size(table)
            table.end()
            said = [f"'{key}'" for key, value in kinds.items() if value is not None]
            if len(said) > 1:
                raise UsageError(
                    f"{table.where} has {' and '.join(said)}: a disk lies in a pool, on a file, or "
                    "is a part of another"
                )
            if kinds["split"] is not None:
                yield from self._parts(name, place, table, kinds["split"], size, count)
            elif kinds["file"] is not None:
                if count is not None:
                    raise UsageError(
                        f"{table.where}: a file is one disk, and can't be {count}", field="count"
                    )
                yield LabDisk(name, name, place, size, file=self.folder / kinds["file"])
            else:
                if size is None:
                    raise UsageError(f"{table.where} has no 'size'", hint='size = "40G"')
                pool = choose_pool(self.source, (*place, "pool"), kinds["pool"], pools)
                for each in numbered(name, count):
                    yield LabDisk(each, name, place, size, pool)

    def _parts(
        self, name: str, place: Place, table: Table, base: str, size: int | None, count: int | None
    ) -> Iterator[LabDisk]:
        if count is None or not 2 <= count <= PARTS_MOST:
            raise UsageError(
                f"{table.where} splits '{base[:80]}', and needs a 'count' from 2 on", field="count"
            )
        for number, each in enumerate(numbered(name, count)):
            yield LabDisk(each, name, place, size, base=base, part=number, parts=count)

    def _net(self, name: str, place: Place, table: Table) -> LabNet:
        with located(self.source, place):
            kinds = {key: table.take(key, str) for key in ("mode", "network", "bridge")}
            text, mtu = table.take("subnet", str), table.take("mtu", int)
            uplink = table.take("uplink", str)
            table.end()
            said = [key for key, value in kinds.items() if value is not None]
            if len(said) > 1:
                raise UsageError(
                    f"{table.where} has {' and '.join(map(repr, said))}: a network is made, or is "
                    "there already",
                    field=said[1],
                )
            with keyed("subnet"):
                subnet = None if text is None else read_subnet(text, f"{table.where}: ")
            net = LabNet(
                name,
                place,
                kinds["mode"] or USER_MODE,
                subnet,
                uplink,
                mtu,
                kinds["network"],
                kinds["bridge"],
            )
            self._check_net(net, table.where)
            return net

    def _check_net(self, net: LabNet, where: str) -> None:
        if net.mode not in (USER_MODE, *MODES):
            raise UsageError(
                f"{where}: 'mode' is '{net.mode[:80]}', and should be one of "
                f"{', '.join((USER_MODE, *MODES))}",
                field="mode",
                hint='one that is there already: network = "NAME", or bridge = "br0"',
            )
        if net.network is not None:
            with keyed("network"):
                check_network_name(net.network)
        if not net.is_made:
            for key in ("subnet", "uplink", "mtu"):
                if getattr(net, key) is not None:
                    raise UsageError(
                        f"{where}: '{key}' is for a network that 'up' makes, which has a mode "
                        f"such as {MODES[0]}",
                        field=key,
                    )
            return
        subnet = net.subnet
        if subnet is None and net.mode != "bridge":
            subnet = _SOME_SUBNET  # a free one is chosen
        full = network_name(self.name, net.name)
        made = Network(full, net.mode, bridge_name(full), subnet, net.uplink, net.mtu)
        check_network(made, where)
