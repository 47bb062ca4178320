"""netplan's YAML: what was said of the uplink's addresses is said of the bridge.

Context: any; reads, and returns what should be. netplan merges its files, and a later one can
take nothing away from an earlier one, nor be about what only a later one names. So the uplink's
addresses leave the files in which they are, and the bridge comes into the first that names the
uplink. Comments stay.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

from drivebay.errors import StateError
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.state import Before
from drivebay.net.hostbridge.writers.files import NewFile
from drivebay.net.hostbridge.writers.networkd import identity_lines

__all__ = ["netplan_files"]

_FOLDERS: Final = ("lib/netplan", "etc/netplan", "run/netplan")  # a later one's file counts
_DEVICES: Final = ("ethernets", "bonds", "vlans")
# What is about the device itself; all else is about its addresses.
_STAYS: Final = {
    "match", "set-name", "wakeonlan", "emit-lldp", "mtu", "macaddress", "renderer", "auth",
    "interfaces", "parameters", "id", "link", "openvswitch", "infiniband-mode",
    "virtual-function-count", "embedded-switch-mode", "delay-virtual-functions-rebind",
    "receive-checksum-offload", "transmit-checksum-offload", "tcp-segmentation-offload",
    "tcp6-segmentation-offload", "generic-segmentation-offload", "generic-receive-offload",
    "large-receive-offload",
}  # fmt: skip
_BOTH: Final = ("mtu", "renderer")
_MODE: Final = 0o600


def netplan_files(before: Before, manager: Manager, root: Path) -> list[NewFile]:
    """Raises: StateError when no file is about the uplink, or one can't be read or changed."""
    files = [(path, _load(path)) for path in _sources(root)]
    identifier, first = _identifier(before, manager, files)
    moved: dict[str, Any] = {}
    touched = {path: _take(document, identifier, before.bridge, moved) for path, document in files}
    bridges = first["network"].setdefault("bridges", {})
    bridges[before.bridge] = _bridge(before, identifier, moved)
    changed = [
        NewFile(_home(path, root), _dump(document), _MODE)
        for path, document in files
        if touched[path] or document is first
    ]
    identity = identity_lines(manager)
    if identity:
        folder = root / f"etc/systemd/network/10-netplan-{before.bridge}.network.d"
        changed.append(NewFile(folder / "drivebay.conf", identity.lstrip()))
    return changed


def _bridge(before: Before, identifier: str, moved: dict[str, Any]) -> dict[str, Any]:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    bridge: dict[str, Any] = {
        "interfaces": [identifier],
        # Without quotes some readers of YAML take a MAC for a number.
        "macaddress": DoubleQuotedScalarString(before.uplink.mac),
        "parameters": {"stp": False, "forward-delay": 0},
        **moved,
    }
    if "routes" in bridge:
        bridge["routes"] = [_numeric(route) for route in bridge["routes"]]
    _old_gateways(bridge)
    return bridge


def _sources(root: Path) -> list[Path]:
    """The files in netplan's order: by name, whatever the folder."""
    found = {
        path.name: path for folder in _FOLDERS for path in sorted((root / folder).glob("*.yaml"))
    }
    return [found[name] for name in sorted(found)]


def _load(path: Path) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        document = _yaml().load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, YAMLError) as error:
        raise StateError(f"can't read '{path}': {str(error).splitlines()[0]}") from error
    return document if isinstance(document, dict) else {}


def _dump(document: Any) -> str:
    out = io.StringIO()
    _yaml().dump(document, out)
    return out.getvalue()


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096  # lines are not folded
    return yaml


def _home(path: Path, root: Path) -> Path:
    """Where a changed file goes. Raises: StateError when it would not count there."""
    if path.is_relative_to(root / "run"):
        raise StateError(f"'{path}' configures the uplink, and is made anew at each start")
    return root / "etc/netplan" / path.name


def _identifier(before: Before, manager: Manager, files: list[tuple[Path, Any]]) -> tuple[str, Any]:
    """netplan's name of the uplink, and the first document that has it."""
    known = re.fullmatch(
        r".*-netplan-(.+)\.network|netplan-(.+)\.nmconnection", Path(manager.source).name
    )
    wanted = next((group for group in known.groups() if group), "") if known else ""
    for _, document in files:
        for kind in _DEVICES:
            for identifier, said in (_network(document).get(kind) or {}).items():
                if wanted == identifier or (not wanted and _is_it(identifier, said, before)):
                    return str(identifier), document
    raise StateError(f"no file of netplan is about '{before.uplink.name}'")


def _network(document: Any) -> Any:
    found = document.get("network")
    return found if isinstance(found, dict) else {}


def _is_it(identifier: str, said: Any, before: Before) -> bool:
    match = said.get("match") if isinstance(said, dict) else None
    if not match:
        return identifier == before.uplink.name
    return str(match.get("macaddress", "")).lower() == before.uplink.mac or (
        match.get("name") == before.uplink.name
    )


def _take(document: Any, identifier: str, bridge: str, moved: dict[str, Any]) -> bool:
    """Take what goes with the bridge out of one file; whether there was anything."""
    touched = False
    for kind in _DEVICES:
        for name, said in (_network(document).get(kind) or {}).items():
            if not isinstance(said, dict):
                continue
            if kind == "vlans" and said.get("link") == identifier:
                said["link"] = bridge
                touched = True
            if name != identifier:
                continue
            for key in list(said):
                if key in _BOTH:
                    _merge(moved, key, said[key])
                elif key not in _STAYS:
                    _merge(moved, key, said.pop(key))
                    touched = True
    return touched


def _merge(moved: dict[str, Any], key: str, value: Any) -> None:
    """As netplan merges: lists grow, tables are joined, the last of anything else counts."""
    plain = _plain(value)
    old = moved.get(key)
    if isinstance(old, list) and isinstance(plain, list):
        moved[key] = old + [each for each in plain if each not in old]
    elif isinstance(old, dict) and isinstance(plain, dict):
        for inner, each in plain.items():
            _merge(old, inner, each)
    else:
        moved[key] = plain


def _plain(value: Any) -> Any:
    """Without the comments and quotes of the file that it comes from."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def _numeric(route: Any) -> Any:
    """A default route in numbers, which every netplan reads."""
    if not isinstance(route, dict) or route.get("to") not in ("default", "0/0", "::0/0"):
        return route
    return {**route, "to": "::/0" if ":" in str(route.get("via", "")) else "0.0.0.0/0"}


def _old_gateways(bridge: dict[str, Any]) -> None:
    """`gateway4` and `gateway6`, which netplan warns of, become routes."""
    for key, target in (("gateway4", "0.0.0.0/0"), ("gateway6", "::/0")):
        gateway = bridge.pop(key, None)
        if gateway is not None:
            bridge.setdefault("routes", []).append({"to": target, "via": gateway})
