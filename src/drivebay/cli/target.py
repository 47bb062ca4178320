"""`drivebay target run|start|stop|status|top`: the life of a target process.

Context: a short-lived process, except for `run`, which is `drivebay vhost`.
A running target is asked over its RPC socket; what the kernel knows of the
process (its id, age and processor time) comes from the socket and from /proc.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivebay.cli import vhost
from drivebay.cli.arguments import Parser, add_json_option, add_socket_option
from drivebay.cli.output import DONE, print_json, print_table
from drivebay.disks.connection import RpcRefused, answers, call, connect, find_socket, target_pid
from drivebay.disks.places import data_folder
from drivebay.errors import HostError, InUse, Unreachable, UsageError
from drivebay.target import daemon
from drivebay.target.options import check_options

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["build_parser", "main"]

# Code of the answer to a method that may only be called after framework_start_init.
_NOT_STARTED = -1
# How long `status` watches the processors.
_WATCH_S = 0.5


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    if arguments[:1] == ["run"]:
        return vhost.main(arguments[1:], prog="drivebay target run")
    if arguments[:1] == ["start"]:
        return _start(arguments[1:])
    found = build_parser().parse_args(arguments)
    if found.subcommand == "top":
        from drivebay.cli import top

        return top.run(found)
    return _stop(found) if found.subcommand == "stop" else _status(found)


def build_parser() -> Parser:
    """Return the parser of this command; `run` and `start` take vhost's options instead."""
    parser = Parser("drivebay target", description="Run, start or stop the target, or show it.")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    commands.add_parser("run", help="run it in the foreground, as 'drivebay vhost' does")
    commands.add_parser("start", help="run it in the background, with vhost's options")
    stop = commands.add_parser("stop", help="end it, and wait until it has ended")
    stop.add_argument("--force", action="store_true", help="even when virtual machines use it")
    status = commands.add_parser("status", help="show what it is doing")
    status.add_argument(
        "--bundle",
        metavar="FILE",
        help="instead write all that a maintainer needs into one archive (tar.gz), even if the "
        "target does not answer",
    )
    top = commands.add_parser("top", help="watch its disks, controllers and reactors")
    top.add_argument("--once", action="store_true", help="show one second, and end")
    for command in (stop, status, top):
        add_socket_option(command)
        add_json_option(command)
    return parser


def _start(arguments: list[str]) -> int:
    """Start it in the background. Takes vhost's options, of which ``--json`` names a file."""
    found = vhost.build_parser("drivebay target start").parse_args(arguments)
    if found.no_rpc_server:
        raise UsageError(
            "without its RPC server a background target can't be watched or stopped",
            hint="leave out --no-rpc-server, or use 'drivebay target run'",
        )
    socket_dir = found.socket_dir
    if socket_dir == vhost.DEFAULT_SOCKET_DIR:
        # The working folder suits somebody who looks at the target; this one runs on
        # when its terminal is long gone.
        socket_dir = str(daemon.make_state_folder())
    if found.config is None and not found.wait_for_rpc:
        # Disks that people make one by one have to be there after a restart too.
        found.config, found.autosave = str(_kept_configuration()), True
        arguments = [*arguments, "-c", found.config, "--autosave"]
    check_options(replace(vhost.read_options(found), socket_dir=socket_dir))
    record = daemon.start_background(
        [*arguments, "-S", socket_dir],
        rpc_socket=found.rpc_socket,
        socket_dir=socket_dir,
        answers=lambda: answers(found.rpc_socket),
    )
    print(f"target started: process {record.pid}")
    print(f"  RPC socket            {record.rpc_socket}")
    print(f"  controllers' sockets  {record.socket_dir}")
    print(f"  log                   {record.log_file}")
    if found.config is not None:
        kept = "kept after every change" if found.autosave else "read once"
        print(f"  configuration         {found.config}, {kept}")
    return DONE


def _kept_configuration() -> Path:
    """The file in which this user's background target keeps what it has. Raises: HostError."""
    folder = data_folder()
    try:
        # Others may pass through, to the files of networks, which they look at.
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"can't make the folder '{folder}' for the target's configuration",
            error.errno or 0,
            path=str(folder),
            hint="set XDG_DATA_HOME to a folder of yours, or name a file with -c FILE",
        ) from error
    return folder / "target.json"


def _stop(found: argparse.Namespace) -> int:
    try:
        pid = _stop_by_rpc(found.socket, found.force)
    except Unreachable:
        # A target whose RPC hangs is still a process that we know.
        background = daemon.find_background()
        if found.socket is not None or background is None or not found.force:
            raise
        pid = background.pid
        daemon.end_process(pid)
    if found.json:
        print_json({"stopped": pid})
    else:
        print(f"target stopped: process {pid}")
    return DONE


def _stop_by_rpc(socket: str | None, force: bool) -> int:
    path = find_socket(socket)
    with connect(path) as client:
        version = str(call(client, "spdk_get_version")["version"])
        if not version.startswith("Drivebay"):
            raise UsageError(
                f"what answers at '{path}' is '{version}' and not a Drivebay target",
                hint="name the socket of the one to stop: drivebay target stop -s SOCKET",
            )
        sessions = {
            entry["ctrlr"]: len(entry["sessions"])
            for entry in _controllers(client)
            if entry["sessions"]
        }
        if sessions and not force:
            names = ", ".join(f"{name} ({count})" for name, count in sessions.items())
            raise InUse(
                f"virtual machines have sessions on {names}: they would lose their disks",
                hint="shut the machines down first, or 'drivebay target stop --force'",
            )
        # While this connection is open the process is alive, so its id is its own.
        pid = target_pid(path)
        daemon.end_process(pid)
    return pid


def _status(found: argparse.Namespace) -> int:
    path = find_socket(found.socket)
    if found.bundle is not None:
        return _bundle(found, path)
    with connect(path) as client:
        status = _look(client, path)
    if found.json:
        print_json(status)
    else:
        _print_status(status)
    return DONE


def _bundle(found: argparse.Namespace, socket: str) -> int:
    from drivebay.cli.bundle import write_bundle

    bundle = write_bundle(Path(found.bundle), socket)
    if found.json:
        print_json(
            {
                "bundle": found.bundle,
                "pid": bundle.pid,
                "answered": bundle.silent is None,
                "files": sorted(bundle.files),
                "missing": bundle.missing,
            }
        )
    else:
        print(
            f"written: {found.bundle}, {len(bundle.files)} files; look through it before you "
            "send it"
        )
    if bundle.silent is None:
        return DONE
    raise Unreachable(
        f"the target does not answer: {bundle.silent}",
        hint=f"'{found.bundle}' holds what the kernel says of it",
    )


def _look(client: Client, path: str) -> dict[str, Any]:
    """Ask twice, half a second apart: what the processors did is the difference."""
    pid = target_pid(path)
    before, before_times = _reactors(client), daemon.process_times(pid)
    time.sleep(_WATCH_S)
    after, after_times = _reactors(client), daemon.process_times(pid)
    background = daemon.find_background()
    own = background is not None and background.pid == pid
    cpu = age = None
    if before_times is not None and after_times is not None:
        age = round(after_times.age, 1)
        spent = after_times.cpu - before_times.cpu
        cpu = round(100 * spent / max(after_times.age - before_times.age, _WATCH_S), 1)
    controllers = [_controller_status(entry) for entry in _controllers(client)]
    return {
        "pid": pid,
        "version": call(client, "spdk_get_version")["version"],
        "state": "waiting for framework_start_init" if after is None else "running",
        "uptime_s": age,
        "cpu_percent": cpu,
        "rpc_socket": path,
        "log_file": background.log_file if background is not None and own else None,
        "reactors": _busy(before, after),
        "controllers": controllers,
        "sessions": sum(entry["sessions"] for entry in controllers),
    }


def _reactors(client: Client) -> dict[int, tuple[int, int]] | None:
    """Busy and idle ticks by core; None before the start."""
    try:
        found = call(client, "framework_get_reactors")["reactors"]
    except RpcRefused as error:
        if error.code == _NOT_STARTED:
            return None
        raise
    return {entry["lcore"]: (entry["busy"], entry["idle"]) for entry in found}


def _busy(
    before: dict[int, tuple[int, int]] | None, after: dict[int, tuple[int, int]] | None
) -> list[dict[str, Any]]:
    result = []
    for core, (busy, idle) in (after or {}).items():
        busy_before, idle_before = (before or {}).get(core, (0, 0))
        worked, rested = busy - busy_before, idle - idle_before
        share = 100 * worked / (worked + rested) if worked + rested else 0.0
        result.append({"core": core, "busy_percent": round(share, 1)})
    return result


def _controllers(client: Client) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = call(client, "vhost_get_controllers")
    except RpcRefused as error:
        if error.code == _NOT_STARTED:
            return []
        raise
    return found


def _controller_status(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": entry["ctrlr"],
        "bdev": entry["backend_specific"].get("block", {}).get("bdev"),
        "socket": entry["socket"],
        "sessions": len(entry["sessions"]),
    }


def _print_status(status: dict[str, Any]) -> None:
    uptime = "unknown" if status["uptime_s"] is None else _spell_seconds(status["uptime_s"])
    cpu = "unknown" if status["cpu_percent"] is None else f"{status['cpu_percent']} % of one core"
    print(f"target      {status['state']}, process {status['pid']}, {status['version']}")
    print(f"uptime      {uptime}")
    print(f"processor   {cpu}")
    print(f"RPC socket  {status['rpc_socket']}")
    if status["log_file"]:
        print(f"log         {status['log_file']}")
    reactors = ", ".join(
        f"core {entry['core']} {entry['busy_percent']} % busy" for entry in status["reactors"]
    )
    print(f"reactors    {reactors or 'none yet'}")
    print(f"sessions    {status['sessions']}")
    if status["controllers"]:
        print()
        print_table(
            ("controller", "bdev", "sessions", "socket"),
            [
                (entry["name"], entry["bdev"] or "-", entry["sessions"], entry["socket"])
                for entry in status["controllers"]
            ],
        )


def _spell_seconds(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days} d {hour:02}:{minute:02}:{second:02}"
        if days
        else f"{hour:02}:{minute:02}:{second:02}"
    )
