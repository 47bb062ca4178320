"""`drivebay rpc METHOD [JSON]`: call any method of a running target.

Context: a short-lived process that reaches the target through rpc.client only.
`save_config` and `load_config` are no methods: as with SPDK's client they are
composed here, of the calls that read and rebuild the configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivebay.cli.arguments import Parser, add_socket_option
from drivebay.cli.following import call_to_the_end, follow
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.disks.connection import call, connect
from drivebay.errors import DrivebayError, HostError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["build_parser", "load_config", "main", "save_config"]

_EPILOG = """\
examples:
  drivebay rpc bdev_malloc_create '{"name": "M0", "block_size": 512, "num_blocks": 131072}'
  drivebay rpc vhost_create_blk_controller '{"ctrlr": "vhost.0", "dev_name": "M0"}'
  drivebay rpc rpc_get_methods
  drivebay rpc save_config > vhost.json
  drivebay rpc load_config vhost.json
"""


def main(arguments: list[str]) -> int:
    """Call the method and print its result as JSON."""
    found = build_parser().parse_args(arguments)
    if found.method == "load_config":
        config = _read_config(found.params)
        with connect(found.socket) as client:
            load_config(client, config)
        return DONE
    if found.method == "save_config" and found.params is not None:
        raise UsageError("save_config takes no parameters", hint="drivebay rpc save_config > FILE")
    params = _read_params(found.params)
    with connect(found.socket) as client:
        if found.method == "save_config":
            result: Any = save_config(client)
        else:
            result = call_to_the_end(client, found.socket, found.method, params)
        print_json(result)
        follow(client, found.method, params, result)
    return DONE


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        "drivebay rpc",
        description="Call a method of a running target and print its result as JSON.",
        epilog=_EPILOG,
    )
    add_socket_option(parser)
    parser.add_argument("method", metavar="METHOD", help="a method, save_config or load_config")
    parser.add_argument(
        "params",
        metavar="JSON",
        nargs="?",
        help="its parameters as a JSON object; for load_config a file (default: standard input)",
    )
    return parser


def save_config(client: Client) -> dict[str, Any]:
    """Return the configuration: per subsystem, the calls that rebuild what is there."""
    names = [entry["subsystem"] for entry in call(client, "framework_get_subsystems")]
    return {
        "subsystems": [
            {"subsystem": name, "config": call(client, "framework_get_config", {"name": name})}
            for name in names
        ]
    }


def load_config(client: Client, config: Any) -> None:
    """Make the calls of a configuration, and those before the start if it is still to come.

    Raises: DrivebayError for a file of another shape or a method that the target
    does not have (before any call is made), and for the first call that fails.
    """
    entries = _entries(config)
    known = set(call(client, "rpc_get_methods", {"include_aliases": True}))
    for where, method, _ in entries:
        if method not in known:
            raise DrivebayError(
                f"{where} of the configuration calls '{method}', which this target does not have",
                hint="nothing was loaded; take the entry out and try again",
            )
    current = set(call(client, "rpc_get_methods", {"current": True}))
    if "framework_start_init" in current:
        entries = _replay(client, entries, current)
        call(client, "framework_start_init")
        current = set(call(client, "rpc_get_methods", {"current": True}))
    skipped = _replay(client, entries, current)
    if skipped:
        names = ", ".join(dict.fromkeys(method for _, method, _ in skipped))
        print_warning(f"skipped, because they belong before the start: {names}")


_Entry = tuple[str, str, Any]


def _replay(client: Client, entries: list[_Entry], current: set[str]) -> list[_Entry]:
    """Call what may be called now; returns the others."""
    later = []
    for entry in entries:
        where, method, params = entry
        if method not in current:
            later.append(entry)
            continue
        try:
            call(client, method, params)
        except DrivebayError as error:
            raise DrivebayError(
                f"{where} of the configuration failed: {error}", hint=error.hint
            ) from error
    return later


def _entries(config: Any) -> list[_Entry]:
    """Flatten a configuration to (where it stands, method, parameters). Raises: UsageError."""
    entries: list[_Entry] = []
    subsystems = config.get("subsystems") if isinstance(config, dict) else None
    if not isinstance(subsystems, list):
        raise UsageError("a configuration is an object with an array 'subsystems'")
    for index, subsystem in enumerate(subsystems):
        calls = subsystem.get("config") if isinstance(subsystem, dict) else None
        name = subsystem.get("subsystem") if isinstance(subsystem, dict) else None
        if not isinstance(name, str) or not isinstance(calls, list | None):
            raise UsageError(f"subsystem {index} of the configuration has no name or no calls")
        flat: list[Any] = []
        for entry in calls or []:  # SPDK may group calls into batches
            flat += entry if isinstance(entry, list) else [entry]
        for number, entry in enumerate(flat, 1):
            where = f"entry {number} of '{name}'"
            if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
                raise UsageError(f"{where} of the configuration names no method")
            entries.append((where, entry["method"], entry.get("params")))
    return entries


def _read_params(text: str | None) -> Any:
    if text is None:
        return None
    try:
        params = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"the parameters are not JSON: {error}",
            hint='write an object in single quotes: \'{"name": "M0"}\'',
        ) from error
    if not isinstance(params, dict | list):
        raise UsageError(
            "the parameters must be a JSON object",
            hint='write an object in single quotes: \'{"name": "M0"}\'',
        )
    return params


def _read_config(file: str | None) -> Any:
    try:
        text = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text("utf-8")
    except OSError as error:
        raise HostError("can't read the configuration", error.errno or 0, path=file) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the configuration is not UTF-8 text: {error}") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"the configuration is not JSON: {error}") from error
