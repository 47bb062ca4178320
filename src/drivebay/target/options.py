"""What the target is started with: the values, and the checks against this host.

Context: control, before anything exists. The command line fills `Options` and
calls `check_options`; whatever would make the target fail later for a reason
that can be seen now is refused here, with the value and the mend. Nothing here
creates or changes anything.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from drivebay.errors import HostError, NotFound, UsageError
from drivebay.vhost import cpumask

__all__ = [
    "DEFAULT_RPC_SOCKET",
    "SOCKET_PATH_LIMIT",
    "Options",
    "available_cores",
    "check_options",
    "check_socket_path",
    "format_cpumask",
    "parse_cpumask",
]

DEFAULT_RPC_SOCKET = "/var/tmp/spdk.sock"

# sockaddr_un.sun_path holds 108 bytes, the last one a NUL (unix(7)).
SOCKET_PATH_LIMIT = 107


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one target process runs. Paths stay as they were written."""

    socket_dir: str = "."  # controllers' sockets are made here, as DIR/NAME
    cores: tuple[int, ...] = (0,)  # one reactor each, ascending
    main_core: int | None = None  # the control thread's; None keeps it off the reactors' cores
    rpc_socket: str | None = DEFAULT_RPC_SOCKET  # None: no RPC server
    rpcs_allowed: frozenset[str] | None = None  # None: all methods
    wait_for_rpc: bool = False
    memory_mb: int = 0  # bound on the memory of malloc bdevs together; 0: none
    config: str | None = None
    ignore_init_errors: bool = False
    autosave: bool = False  # write `config` after every change
    pid_file: str | None = None
    log_flags: tuple[str, ...] = ()
    silence_notice: bool = False
    poll_us: int | None = None  # None: the reactor's own choice; -1: poll for ever
    socket_mode: int | None = None  # of controllers' sockets; None: 0600
    socket_group: str | None = None  # of controllers' sockets; None: the process's own


def available_cores() -> tuple[int, ...]:
    """Cores this process may run on, ascending (a container may have fewer than the machine)."""
    return tuple(sorted(os.sched_getaffinity(0)))


def parse_cpumask(text: str, available: Collection[int]) -> tuple[int, ...]:
    """Return the cores of a cpumask, ascending, all of which are ``available``.

    >>> parse_cpumask("[0,2-3]", range(4))
    (0, 2, 3)

    Raises: UsageError for text that is no mask and for cores that are not here.
    """
    mask = cpumask.parse_cpumask(text)
    cores = [core for core in range(mask.bit_length()) if mask >> core & 1]
    absent = sorted(set(cores) - set(available))
    if absent:
        have = _spell_cores(available)
        raise UsageError(
            f"cpumask '{text[:80]}' names core {_spell_cores(absent)}, which is not among the "
            f"cores that may be used here: {have}",
            field="cpumask",
            hint=f"use a mask within [{have}]",
        )
    return tuple(cores)


def format_cpumask(cores: Iterable[int]) -> str:
    """Write cores as a hexadecimal mask.

    >>> format_cpumask([0, 2])
    '0x5'
    """
    return hex(sum(1 << core for core in cores))


def check_socket_path(path: str, what: str) -> None:
    """Refuse a path that does not fit a socket address or whose folder can't hold it.

    Raises: UsageError, HostError. ``what`` names the socket in the sentence.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise UsageError(
            f"the path of {what} is {length} bytes long, a socket address holds at most "
            f"{SOCKET_PATH_LIMIT}: '{path}'",
            hint="use a folder with a shorter path, such as /run/drivebay",
        )
    _check_folder(str(Path(path).parent), what)


def check_options(options: Options) -> None:
    """Refuse what can't work on this host. Raises: UsageError, NotFound, HostError."""
    _check_folder(options.socket_dir, "controllers' sockets")
    # A controller's name has one byte at least, and a slash stands before it.
    room = SOCKET_PATH_LIMIT - len(os.fsencode(options.socket_dir)) - 1
    if room < 1:
        raise UsageError(
            f"the folder '{options.socket_dir}' leaves no room for a socket's name: a socket "
            f"address holds at most {SOCKET_PATH_LIMIT} bytes",
            hint="use a folder with a shorter path, such as /run/drivebay",
        )
    if options.rpc_socket is not None:
        check_socket_path(options.rpc_socket, "the RPC socket")
    if options.pid_file is not None:
        _check_folder(str(Path(options.pid_file).parent), "the pid file")
    if options.wait_for_rpc and options.rpc_socket is None:
        raise UsageError(
            "--wait-for-rpc waits for ever without an RPC server", hint="leave out one of the two"
        )
    if options.autosave and options.config is None:
        raise UsageError("--autosave has no file to write", hint="name it with -c FILE")
    if options.config is not None:
        _check_config(Path(options.config), options.autosave)
    if options.main_core is not None and options.main_core not in available_cores():
        raise UsageError(
            f"main core {options.main_core} is not among the cores that may be used here: "
            f"{_spell_cores(available_cores())}"
        )


def _check_folder(folder: str, what: str) -> None:
    place = Path(folder)
    status = _status(place, f"the folder '{folder}' for {what}", hint=f"mkdir -p {folder}")
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"'{folder}' is not a folder, but {what} should be made in it")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        raise HostError(
            f"user {os.geteuid()} can't write to the folder '{folder}' for {what}",
            errno.EACCES,
            path=folder,
            hint="use another folder, or give this one to the user that runs drivebay",
        )


def _check_config(file: Path, autosave: bool) -> None:
    if autosave:  # it is replaced after each change, and may not be there yet
        _check_folder(str(file.parent), "the configuration file")
        if not file.exists():
            return
    _status(
        file,
        f"the configuration file '{file}'",
        hint=f"write one with: drivebay rpc save_config > {file}",
    )
    if not os.access(file, os.R_OK, effective_ids=True):
        raise HostError(
            f"user {os.geteuid()} can't read the configuration file '{file}'",
            errno.EACCES,
            path=str(file),
        )


def _status(place: Path, what: str, hint: str) -> os.stat_result:
    try:
        return place.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{what} does not exist", hint=hint) from None
    except OSError as error:
        raise HostError(
            f"can't look at {what}", error.errno or errno.EIO, path=str(place)
        ) from error


def _spell_cores(cores: Collection[int]) -> str:
    """Write cores as ranges: '0-3,6'."""
    parts: list[str] = []
    for core in sorted(cores):
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and int(last or first) == core - 1:
            parts[-1] = f"{first}-{core}"
        else:
            parts.append(str(core))
    return ",".join(parts)
