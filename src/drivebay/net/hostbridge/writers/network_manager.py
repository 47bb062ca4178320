"""NetworkManager's profiles: the bridge gets what the uplink's profile says of addresses.

Context: any; reads, and returns what should be.
"""

from __future__ import annotations

import configparser
import io
import uuid
from pathlib import Path
from typing import Final

from drivebay.errors import StateError
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.state import Before
from drivebay.net.hostbridge.writers.files import NewFile

__all__ = ["network_manager_files"]

FOLDER: Final = Path("etc/NetworkManager/system-connections")
_ADDRESSES: Final = ("ipv4", "ipv6", "proxy", "user")
_MODE: Final = 0o600


def network_manager_files(before: Before, manager: Manager, root: Path) -> list[NewFile]:
    """Raises: StateError when the uplink's profile is not in a file."""
    if not manager.source:
        raise StateError("NetworkManager's profile of the uplink is not in a file")
    source = root / manager.source.lstrip("/")
    old = _read(source)
    up, bridge = before.uplink, before.bridge
    port = _parser()
    for section in old.sections():
        if section not in _ADDRESSES:
            port[section] = dict(old[section])
    port["connection"] = {
        **_connection(f"drivebay-{up.name}", "ethernet", up.name),
        "master": bridge, "slave-type": "bridge",
    }  # fmt: skip
    upper = _parser()
    upper["connection"] = {
        **{
            key: value for key, value in old["connection"].items() if key in ("zone", "permissions")
        },
        **_connection(f"drivebay-{bridge}", "bridge", bridge),
        "autoconnect-slaves": "1",
    }
    upper["bridge"] = {"mac-address": up.mac.upper(), "stp": "false", "forward-delay": "0"}
    upper["ethernet"] = {"mtu": str(up.mtu)}
    for section in _ADDRESSES:
        if old.has_section(section):
            upper[section] = dict(old[section])
    folder = root / FOLDER
    files = [
        NewFile(folder / f"drivebay-{bridge}.nmconnection", _text(upper), _MODE),
        NewFile(folder / f"drivebay-{up.name}.nmconnection", _text(port), _MODE),
    ]
    # A profile in /run is made anew by nobody; NetworkManager made it for lack of another.
    return [*files, NewFile(source, None)] if source.is_relative_to(root / "etc") else files


def _connection(name: str, kind: str, interface: str) -> dict[str, str]:
    return {
        "id": name,
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.drivebay")),
        "type": kind,
        "interface-name": interface,
        "autoconnect-priority": "100",
    }


def _parser() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    return parser


def _read(source: Path) -> configparser.ConfigParser:
    parser = _parser()
    try:
        parser.read_string(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, configparser.Error) as error:
        raise StateError(f"can't read the profile '{source}': {error}") from error
    if not parser.has_section("connection"):
        raise StateError(f"the profile '{source}' has no section 'connection'")
    return parser


def _text(parser: configparser.ConfigParser) -> str:
    out = io.StringIO()
    parser.write(out, space_around_delimiters=False)
    return out.getvalue()
