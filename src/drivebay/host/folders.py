"""The folders that commands and sockets need: may we use them, are they full, are names too long?

Context: a short-lived process; changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.disks.places import data_folder
from drivebay.disks.sizes import format_size
from drivebay.errors import StateError
from drivebay.host.finding import Finding, failed
from drivebay.system.processes import unprivileged
from drivebay.target.daemon import find_background, state_folder
from drivebay.vm.disks import check_way, controller_name
from drivebay.vm.hardware import SOCKET_PATH_MOST
from drivebay.vm.places import cache_folder

__all__ = ["check_folders", "existing"]

_FULL_AT: Final = 0.9
_NAME_MOST: Final = 40  # letters of a VM's name,
_DISK_NAME_MOST: Final = 20  # and of its disk's


def check_folders() -> Iterator[Finding]:
    """Check where data, downloads and sockets are."""
    data = data_folder()
    for folder, use in (
        (data, "VMs, images and pools"),
        (cache_folder(), "downloads"),
        (state_folder(), "the target's sockets and log"),
    ):
        yield _usable(folder, use)
    yield _space(data)
    yield from _check_sockets(data / "vms")


def existing(path: Path) -> Path:
    """The folder itself or the next one above it that there is."""
    while not path.exists():
        path = path.parent
    return path


def _usable(folder: Path, use: str) -> Finding:
    there = existing(folder)
    if not there.is_dir():
        return Finding(
            "problem", "folders", f"'{there}' should be a folder, for {use}", f"ls -ld {there}"
        )
    if os.access(there, os.W_OK | os.X_OK):
        state = "can be used" if there == folder else "can be made"
        return Finding("ok", "folders", f"{folder} {state}, for {use}")
    status = there.stat()
    mend = f"sudo install -d -o {os.geteuid()} -g {os.getegid()} -m 700 {folder}"
    return Finding(
        "problem",
        "folders",
        f"user {os.geteuid()} may not write in '{there}' (of user {status.st_uid}), for {use}",
        mend,
    )


def _space(folder: Path) -> Finding:
    found = os.statvfs(existing(folder))
    free = found.f_bavail * found.f_frsize
    used = found.f_blocks - found.f_bfree
    usable = used + found.f_bavail
    share = used / usable if usable else 1.0
    what = f"the file system of {folder} is {share:.0%} full, {format_size(free)} are free"
    if share < _FULL_AT:
        return Finding("ok", "space", what)
    return Finding("warning", "space", f"{what}; disks fail writes when nothing is left",
                   "drivebay image list; drivebay disk list")  # fmt: skip


def _check_sockets(vms: Path) -> Iterator[Finding]:
    """A socket's path has a bound of its own; QEMU's user must get through to the target's."""
    monitor = vms / ("n" * _NAME_MOST) / "monitor.sock"
    room = SOCKET_PATH_MOST - len(os.fsencode(monitor)) + _NAME_MOST
    if room < _NAME_MOST:
        yield Finding(
            "problem" if room < 1 else "warning",
            "sockets",
            f"in '{vms}' a VM's name may have {max(room, 0)} letters only, since the path of its "
            f"sockets may have {SOCKET_PATH_MOST} bytes",
            "XDG_DATA_HOME=/a/shorter/folder",
        )
    background = find_background()
    folder = state_folder() if background is None else Path(background.socket_dir)
    socket = folder / controller_name("n" * _NAME_MOST, "d" * _DISK_NAME_MOST)
    room = SOCKET_PATH_MOST - len(os.fsencode(socket)) + _NAME_MOST + _DISK_NAME_MOST
    if room < _NAME_MOST + _DISK_NAME_MOST:
        yield Finding(
            "warning",
            "sockets",
            f"in '{folder}' the names of a VM and its disk may have {max(room, 0)} letters "
            f"together, since a socket's path may have {SOCKET_PATH_MOST} bytes",
            "drivebay target start -S /a/shorter/folder",
        )
    identity = unprivileged()
    if identity is not None and folder.exists():
        try:
            check_way(folder / "vm.NAME.DISK", identity.uid)
        except StateError as error:
            yield failed("sockets", error)
            return
    yield Finding("ok", "sockets", f"{folder}: for disks' sockets")
