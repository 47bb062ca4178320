"""Configuration files in SPDK's shape: saving is writing the calls that rebuild what is there.

Context: control. A file holds calls by subsystem; loading replays them, those of the
startup state first. Loading is strict: the first call that fails ends it with a sentence
that names the entry; ``ignore`` goes on instead, and what failed is kept, so that an
autosave does not forget a disk that was absent for one start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.limits import limits_of
from drivebay.errors import HostError, UsageError
from drivebay.rpc.jsonrpc import RpcError
from drivebay.rpc.lacking import lacking_part
from drivebay.rpc.schema import RUNTIME, STARTUP

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.rpc.dispatch import Dispatcher
    from drivebay.target.target import Target

__all__ = [
    "SUBSYSTEMS",
    "Entry",
    "Replay",
    "read_config",
    "saved_config",
    "subsystem_config",
    "write_config",
]

_log = logging.getLogger(__name__)

_MOST_BYTES: Final = 64 * 1024 * 1024

# name -> what it needs, in the order of a saved file.
SUBSYSTEMS: Final[dict[str, tuple[str, ...]]] = {
    "scheduler": (),
    "sock": (),
    "iobuf": (),
    "fsdev": (),
    "accel": ("iobuf",),
    "bdev": ("accel", "sock", "iobuf"),
    "vhost_blk": ("bdev",),
}


def subsystem_config(target: Target, name: str) -> list[dict[str, Any]]:
    """The calls that rebuild one of SUBSYSTEMS as it is now."""
    calls = target.settings.calls(name)
    if name == "accel":
        calls += target.keyring.calls()
    elif name == "bdev":
        calls += _bdev_calls(target)
    elif name == "vhost_blk":
        for controller in sorted(target.controllers, key=lambda controller: controller.name):
            calls += [{"method": method, "params": params} for method, params in controller.save()]
    return calls


def _bdev_calls(target: Target) -> Iterator[dict[str, Any]]:
    """Bdevs that are made by a call, each with what was set on it, then wishes.

    What was set on those that wishes and examining bring comes when all of them are there.
    """
    later: list[dict[str, Any]] = []
    for bdev in target.registry:
        saved = bdev.save()
        if saved is None:
            later += _settings_of(bdev)
            continue
        method, params = saved
        yield {"method": method, "params": {**params, **target.kept_parameters(bdev)}}
        yield from _settings_of(bdev)
    for wish in target.wishes:
        method, params = wish.call()
        yield {"method": method, "params": params}
    for method, params in target.arrays.calls():
        yield {"method": method, "params": params}
    yield {"method": "bdev_wait_for_examine"}
    yield from later


def _settings_of(bdev: Bdev) -> Iterator[dict[str, Any]]:
    """The calls that limit a bdev and count its times."""
    limits = {name: limit for name, limit in limits_of(bdev).items() if limit}
    if limits:
        yield {"method": "bdev_set_qos_limit", "params": {"name": bdev.name, **limits}}
    if bdev.layout is not None:
        params = {"name": bdev.name, "enable": True, **(bdev.histogram_settings or {})}
        yield {"method": "bdev_enable_histogram", "params": params}


def saved_config(target: Target) -> dict[str, Any]:
    """The whole configuration; what could not be loaded at the start is still in it."""
    subsystems = []
    for name in SUBSYSTEMS:
        kept = [entry.call for entry in target.unloaded if entry.subsystem == name]
        subsystems.append({"subsystem": name, "config": subsystem_config(target, name) + kept})
    for name in dict.fromkeys(entry.subsystem for entry in target.unloaded):
        if name not in SUBSYSTEMS:
            kept = [entry.call for entry in target.unloaded if entry.subsystem == name]
            subsystems.append({"subsystem": name, "config": kept})
    return {"subsystems": subsystems}


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Replace the file as a whole, or not at all. Blocking. Raises: HostError."""
    import tempfile  # slow, and not needed before the first change

    text = json.dumps(config, indent=2) + "\n"
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise HostError(
            f"can't write the configuration '{path}'", error.errno or errno.EIO, path=str(path)
        ) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of a configuration file, and where it stands there."""

    subsystem: str
    number: int
    method: str
    params: dict[str, Any] | list[Any] | None
    call: dict[str, Any]


def read_config(path: Path) -> list[Entry]:
    """Read and check a file. Blocking. Raises: HostError, UsageError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"the configuration '{path}' is longer than {_MOST_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise HostError(
            f"can't read the configuration '{path}'", error.errno or errno.EIO, path=str(path)
        ) from error
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the configuration '{path}' is not JSON: {error}") from error
    return list(_entries(path, config))


def _entries(path: Path, config: Any) -> Iterator[Entry]:
    subsystems = config.get("subsystems") if isinstance(config, dict) else None
    if not isinstance(subsystems, list):
        raise UsageError(f"the configuration '{path}' has no list 'subsystems'")
    for position, subsystem in enumerate(subsystems, 1):
        name = subsystem.get("subsystem") if isinstance(subsystem, dict) else None
        calls = subsystem.get("config") if isinstance(subsystem, dict) else None
        if not isinstance(name, str) or not (calls is None or isinstance(calls, list)):
            raise UsageError(
                f"subsystem {position} of the configuration '{path}' is not an object with "
                "'subsystem' and a list 'config'"
            )
        yield from _calls(path, name, calls or [])


def _calls(path: Path, subsystem: str, calls: list[Any]) -> Iterator[Entry]:
    flat: list[Any] = []
    for call in calls:  # SPDK may group calls into batches
        flat += call if isinstance(call, list) else [call]
    for number, call in enumerate(flat, 1):
        method = call.get("method") if isinstance(call, dict) else None
        params = call.get("params") if isinstance(call, dict) else None
        known = isinstance(params, dict | list | None)
        if not isinstance(method, str) or not known:
            raise UsageError(
                f"entry {number} of subsystem '{subsystem}' in '{path}' is not a call: it needs "
                "a 'method', and 'params' that are an object"
            )
        yield Entry(subsystem, number, method, params, call)


class Replay:
    """The calls of one file on their way into a target."""

    def __init__(
        self, dispatcher: Dispatcher, source: str, entries: list[Entry], *, ignore: bool = False
    ) -> None:
        self._dispatcher = dispatcher
        self._source = source
        self._entries = entries
        self._ignore = ignore
        dispatcher.target.registry.examining.spared = _guests_disks(entries)

    async def run(self, state: str) -> None:
        """Make the calls that belong to ``state``; startup's come first, once.

        Raises: UsageError that names the entry which failed.
        """
        for entry in self._entries:
            method = self._dispatcher.methods.get(entry.method)
            states = {RUNTIME} if method is None else method.states
            if state == (STARTUP if STARTUP in states else RUNTIME):
                await self._make(entry, state)
                await asyncio.sleep(0)

    async def _make(self, entry: Entry, state: str) -> None:
        _log.debug("%s: %s, entry %d", entry.subsystem, entry.method, entry.number)
        try:
            if entry.method not in self._dispatcher.methods:
                raise RpcError(0, lacking_part(entry.method) or "there is no such method")
            await self._dispatcher.call(entry.method, entry.params, state=state)
        except RpcError as error:
            sentence = (
                f"entry {entry.number} of subsystem '{entry.subsystem}' in '{self._source}' "
                f"({entry.method}) failed: {_explain(error)}"
            )
            if not self._ignore:
                hint = "mend the file, or go on without it: --json-ignore-init-errors"
                raise UsageError(sentence, hint=hint) from error
            _log.warning("%s", sentence)
            self._dispatcher.target.unloaded.append(entry)


def _guests_disks(entries: list[Entry]) -> frozenset[str]:
    """Names of bdevs that guests write to.

    What a guest wrote there may look like a partition table or a volume store. Taken for one at
    the next start, it would claim the disk, and the controller and with it the start would fail.
    """
    return frozenset(
        str(entry.params["dev_name"])
        for entry in entries
        if entry.method == "vhost_create_blk_controller"
        and isinstance(entry.params, dict)
        and "dev_name" in entry.params
    )


def _explain(error: RpcError) -> str:
    data = error.data or {}
    if "reason" in data:
        return str(data["reason"])
    if "field" in data:
        return f"{error.message}: '{data['field']}' is {data.get('value')!r}; {data.get('hint')}"
    return f"{error.message}: {data['hint']}" if "hint" in data else error.message
