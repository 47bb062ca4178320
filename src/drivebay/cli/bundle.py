"""The support bundle of `drivebay target status --bundle FILE`: one archive for a maintainer.

Context: a short-lived process. What the target says of itself comes over its RPC socket; what
the kernel says of its process and of the host comes from /proc and /sys, so that a target that
answers nothing still leaves a bundle that shows where its threads are. Secrets are masked by
name; the environment of the process is not read. Nothing of the target is changed.
"""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.cli.rpc import save_config
from drivebay.disks.connection import call, connect, target_pid
from drivebay.disks.places import give_name
from drivebay.errors import AlreadyExists, DrivebayError, HostError, Unreachable
from drivebay.target.daemon import find_background

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["Bundle", "write_bundle"]

ANSWER_LIMIT_S: Final = 5.0
_LOG_TAIL_BYTES: Final = 1 << 20
_MOST_BYTES: Final = 4 << 20  # of one file of /proc
_BETWEEN_S: Final = 0.5

_METHODS: Final = (
    "spdk_get_version",
    "drivebay_get_diagnostics",
    "framework_get_reactors",
    "thread_get_stats",
    "vhost_get_controllers",
    "bdev_get_bdevs",
    "bdev_get_iostat",
    "notify_get_notifications",
)
_OF_PROCESS: Final = ("status", "stat", "cmdline", "limits", "io", "cgroup", "smaps_rollup")
_OF_THREAD: Final = ("comm", "status", "stat", "wchan", "syscall", "stack", "schedstat")
# /proc/mounts and the kernel's own command line are left out: they may hold passwords.
_OF_HOST: Final = (
    "/etc/os-release",
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/pressure/cpu",
    "/proc/pressure/io",
    "/proc/pressure/memory",
    "/proc/sys/kernel/io_uring_disabled",
    "/proc/sys/kernel/io_uring_group",
    "/proc/sys/fs/file-nr",
    "/proc/sys/vm/max_map_count",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/isolated",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
)

_SECRET: Final = r"(?:\bkey\d?\b|\w*(?:_key|secret|passw|passphrase|psk|token)\w*)"
_SECRET_NAME: Final = re.compile(_SECRET, re.IGNORECASE)
_SECRET_IN_TEXT: Final = re.compile(
    rf"""(["']?{_SECRET}["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}}]+)""", re.IGNORECASE
)
_MASK: Final = "(left out)"


@dataclass
class Bundle:
    """The archive's files, and what could not be had."""

    files: dict[str, bytes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    pid: int | None = None
    silent: str | None = None  # why the target did not answer

    def add_text(self, name: str, text: str) -> None:
        self.files[name] = mask_text(text).encode("utf-8", "replace")

    def add_json(self, name: str, value: Any) -> None:
        text = json.dumps(mask(value), indent=2, ensure_ascii=False)
        self.files[name] = (text + "\n").encode("utf-8", "replace")

    def add_file(self, name: str, path: Path) -> None:
        """Take a file of /proc or /sys; what the kernel does not let us read is noted."""
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_BYTES)
        except OSError as error:
            self.missing.append(f"{name}: {error.strerror}")
        else:
            self.add_text(name, text.decode("utf-8", "replace").replace("\0", "\n"))


def write_bundle(destination: Path, socket: str) -> Bundle:
    """Collect everything and write the archive; a target that is silent is no reason not to.

    Raises: AlreadyExists, HostError.
    """
    if destination.exists():
        raise AlreadyExists(f"'{destination}' exists already", hint="name another file")
    bundle = Bundle()
    _ask(bundle, socket)
    _look_at_process(bundle, socket)
    for path in _OF_HOST:
        bundle.add_file(f"host{path}", Path(path))
    bundle.add_text("host/uname", " ".join(platform.uname()) + "\n")
    bundle.add_text("README", _introduction(bundle, socket))
    _write(destination, bundle)
    return bundle


def _ask(bundle: Bundle, socket: str) -> None:
    """What the target says; the first call that is not answered in time is the last."""
    try:
        with connect(socket, ANSWER_LIMIT_S) as client:
            for method in _METHODS:
                _ask_one(bundle, client, method, _call(method))
            time.sleep(_BETWEEN_S)
            # Once more: what the reactors do is the difference.
            again = "framework_get_reactors"
            _ask_one(bundle, client, f"{again}.later", _call(again))
            _ask_one(bundle, client, "save_config", save_config)
    except Unreachable as error:
        bundle.silent = str(error)


def _call(method: str) -> Callable[[Client], Any]:
    return lambda client: call(client, method)


def _ask_one(bundle: Bundle, client: Client, name: str, ask: Callable[[Client], Any]) -> None:
    """One answer. Raises: Unreachable, when there is no sense in asking on."""
    try:
        answer = ask(client)
    except Unreachable:
        raise
    except DrivebayError as error:  # an older target, or one that has not started
        bundle.missing.append(f"rpc/{name}: {error}")
        return
    if name == "drivebay_get_diagnostics":
        bundle.add_text("log/recent.log", "\n".join(answer.pop("log")) + "\n")
    bundle.add_json(f"rpc/{name}.json", answer)


def _look_at_process(bundle: Bundle, socket: str) -> None:
    """What the kernel says of the process, each of its threads, and its descriptors."""
    background = find_background()
    try:
        bundle.pid = target_pid(socket)
    except Unreachable as error:
        # Nobody listens; the process that should may live still.
        bundle.missing.append(f"process: {error}")
        if background is not None and background.rpc_socket == socket:
            bundle.pid = background.pid
    if background is not None and background.pid == bundle.pid:
        for number, path in enumerate((background.log_file, f"{background.log_file}.old")):
            _add_tail(bundle, f"log/{Path(path).name}", Path(path), wanted=number == 0)
    if bundle.pid is None:
        return
    process = Path(f"/proc/{bundle.pid}")
    for name in _OF_PROCESS:
        bundle.add_file(f"process/{name}", process / name)
    for thread in _entries(bundle, process / "task"):
        for name in _OF_THREAD:
            bundle.add_file(f"process/task/{thread.name}/{name}", thread / name)
    links = [f"{entry.name} {_link(entry)}" for entry in _entries(bundle, process / "fd")]
    bundle.add_text("process/fd", "\n".join(links) + "\n")


def _entries(bundle: Bundle, folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda entry: int(entry.name))
    except OSError as error:
        bundle.missing.append(f"{folder}: {error.strerror}")
        return []


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError as error:
        return f"({error.strerror})"


def _add_tail(bundle: Bundle, name: str, path: Path, *, wanted: bool) -> None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            bundle.add_text(name, file.read(_LOG_TAIL_BYTES).decode("utf-8", "replace"))
    except OSError as error:
        if wanted:
            bundle.missing.append(f"{name}: {error.strerror}")


def _introduction(bundle: Bundle, socket: str) -> str:
    process = "not found" if bundle.pid is None else str(bundle.pid)
    lines = [
        f"Support bundle of the Drivebay target behind '{socket}', process {process}.",
        f"Made {time.strftime('%Y-%m-%dT%H:%M:%S%z')} by user {os.geteuid()}.",
        "",
        "rpc/      what the target answered",
        "log/      the last lines of its log",
        "process/  what the kernel says of its process and threads",
        "host/     the machine",
        "",
        "Values whose name says that they are secret are left out, wherever they stand.",
        "Names of files, bdevs and machines are not.",
        "",
    ]
    if bundle.silent is not None:
        lines += [f"The target did not answer: {bundle.silent}.", ""]
    lines += ["Could not be had:", *(bundle.missing or ["nothing"])]
    return "\n".join(lines) + "\n"


def _write(destination: Path, bundle: Bundle) -> None:
    """A whole archive under its name, readable by this user alone, or none at all."""
    fresh = destination.with_name(f".{destination.name}.{os.getpid()}")
    folder = f"drivebay-bundle-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with (
            open(descriptor, "wb") as file,  # noqa: PTH123 - a descriptor
            tarfile.open(fileobj=file, mode="w:gz") as archive,
        ):
            for name, content in sorted(bundle.files.items()):
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        give_name(fresh, destination)
    except OSError as error:
        raise HostError(
            f"can't write the bundle '{destination}'",
            error.errno or errno.EIO,
            path=str(destination),
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def mask(value: Any) -> Any:
    """Leave out what a name calls a secret, at any depth.

    >>> mask({"name": "c0", "key": "0011", "tls": {"psk": "NVMe", "port": 4420}})
    {'name': 'c0', 'key': '(left out)', 'tls': {'psk': '(left out)', 'port': 4420}}
    """
    if isinstance(value, dict):
        return {
            name: _MASK if _SECRET_NAME.fullmatch(name) and inner is not None else mask(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [mask(item) for item in value]
    return value


def mask_text(text: str) -> str:
    """The same in lines of a log or of a command.

    >>> mask_text('request: {"key": "00 11", "name": "c0"} --psk=abc')
    'request: {"key": (left out), "name": "c0"} --psk=(left out)'
    """
    return _SECRET_IN_TEXT.sub(rf"\g<1>{_MASK}", text)
