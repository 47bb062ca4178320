"""Who looks after the uplink on this host, told to let go of it for the trial and to take it again.

Context: root. Judged by evidence of this interface, not by which packages are installed. What is
written here lies in /run, so a power cycle forgets it.

    networkd        /run/systemd/netif/links/INDEX names the file it was set up by
    netplan         … and that file, or NetworkManager's profile, is one that netplan made
    network-manager /run/NetworkManager/devices/INDEX names its profile
    ifupdown        /run/network/ifstate, or a stanza of /etc/network/interfaces
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from drivebay.errors import StateError
from drivebay.net.hostbridge.state import LinkState
from drivebay.system.files import refusal

__all__ = [
    "Manager",
    "find_manager",
    "generate",
    "hold_bridge",
    "let_go",
    "name_servers",
    "take_again",
    "take_bridge",
]

NETWORKD: Final = "systemd-networkd"
NETWORK_MANAGER: Final = "NetworkManager"
IFUPDOWN: Final = "ifupdown"
NETPLAN: Final = "netplan"

_COMMAND_SECONDS: Final = 60
_VOLATILE: Final = Path("run/systemd/network")
_PROFILES: Final = (
    "etc/NetworkManager/system-connections", "run/NetworkManager/system-connections",
    "usr/lib/NetworkManager/system-connections",
)  # fmt: skip


@dataclass(frozen=True)
class Manager:
    """``name`` owns the configuration, ``daemon`` acts on it; "" is nobody."""

    name: str = ""
    daemon: str = ""
    source: str = ""  # the file that the interface was set up by
    profile: str = ""  # NetworkManager's UUID of it
    identity: int | None = None  # networkd's number of the interface towards DHCP servers (IAID)
    dns: dict[str, list[str]] = field(default_factory=dict)  # systemd-resolved's, of this link

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_manager(link: LinkState, root: Path = Path("/")) -> Manager:
    """Look for evidence, the strongest first."""
    found = _networkd(link, root) or _network_manager(link, root)
    if found is not None:
        return found
    if _ifupdown(link, root):
        return Manager(IFUPDOWN, source="/etc/network/interfaces")
    return Manager()


def _networkd(link: LinkState, root: Path) -> Manager | None:
    told = _assignments(root / f"run/systemd/netif/links/{link.index}")
    file = told.get("NETWORK_FILE", "")
    if not file or told.get("ADMIN_STATE") in ("unmanaged", "initialized"):
        return None
    lease = _assignments(root / f"run/systemd/netif/leases/{link.index}")
    client = lease.get("CLIENTID", "")
    # RFC 4361: the type 255, four bytes of the interface, and a DUID.
    identity = int(client[2:10], 16) if re.fullmatch(r"ff[0-9a-f]{8,}", client) else None
    by_netplan = "-netplan-" in Path(file).name and file.startswith("/run/")
    return Manager(NETPLAN if by_netplan else NETWORKD, NETWORKD, file, identity=identity)


def _network_manager(link: LinkState, root: Path) -> Manager | None:
    try:
        state = _ini((root / f"run/NetworkManager/devices/{link.index}").read_text())
    except (OSError, configparser.Error):
        return None
    profile = state.get("device", "connection-uuid", fallback="")
    if not profile:
        return None
    for folder in _PROFILES:
        for path in sorted((root / folder).glob("*")):
            try:
                uuid = _ini(path.read_text()).get("connection", "uuid", fallback="")
            except (OSError, UnicodeError, configparser.Error):
                continue
            if uuid == profile:
                name = NETPLAN if path.name.startswith("netplan-") else NETWORK_MANAGER
                source = f"/{path.relative_to(root)}"
                return Manager(name, NETWORK_MANAGER, source, profile)
    return Manager(NETWORK_MANAGER, NETWORK_MANAGER, "", profile)


def _ifupdown(link: LinkState, root: Path) -> bool:
    from drivebay.net.hostbridge.writers.ifupdown import has_stanza

    state = _assignments(root / "run/network/ifstate")
    return link.name in state or has_stanza(root, link.name)


def _ini(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
    parser.read_string(text)
    return parser


def _assignments(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


# ---- the trial ----------------------------------------------------------------------------------


def hold_bridge(manager: Manager, bridge: str) -> None:
    """See to it that nobody sets the bridge up, whose MAC may be what a file is about."""
    if manager.daemon == NETWORKD:
        _write_volatile(bridge)
        _run("networkctl", "reload")


def let_go(manager: Manager, uplink: str, bridge: str) -> None:
    """The uplink has moved: its daemon is to leave it alone; DNS goes along."""
    if manager.daemon == NETWORKD:
        _write_volatile(uplink)
        _run("networkctl", "reload")
    elif manager.daemon == NETWORK_MANAGER:
        _run("nmcli", "device", "set", uplink, "managed", "no")
    for verb, words in manager.dns.items():
        if words:
            _run("resolvectl", verb, bridge, *words)


def take_again(manager: Manager, uplink: str, bridge: str) -> None:
    """The daemon looks after the uplink as before. Harmless when it never let go."""
    _forget_volatile(uplink, bridge)
    if manager.daemon == NETWORKD:
        _run("networkctl", "reload")
    elif manager.daemon == NETWORK_MANAGER:
        _run("nmcli", "connection", "reload")
        _run("nmcli", "device", "set", uplink, "managed", "yes")
        if manager.profile:
            _run("nmcli", "--wait", "20", "connection", "up", "uuid", manager.profile)


def generate(manager: Manager) -> None:
    """Let netplan make its daemon's files of its own. Raises: StateError, with what it says."""
    if manager.name == NETPLAN:
        _run("netplan", "generate")


def take_bridge(manager: Manager, uplink: str, bridge: str) -> None:
    """The daemon looks after the bridge, by the files that were written."""
    _forget_volatile(uplink, bridge)
    if manager.daemon == NETWORKD:
        _run("networkctl", "reload")
    elif manager.daemon == NETWORK_MANAGER:
        profile = f"netplan-{bridge}" if manager.name == NETPLAN else f"drivebay-{bridge}"
        _run("nmcli", "connection", "reload")
        _run("nmcli", "device", "set", uplink, "managed", "yes")
        _run("nmcli", "--wait", "20", "connection", "up", "id", profile)


def _forget_volatile(*devices: str) -> None:
    for device in devices:
        _volatile(device).unlink(missing_ok=True)


def _volatile(device: str) -> Path:
    return Path("/") / _VOLATILE / f"00-drivebay-{device}.network"


def _write_volatile(device: str) -> None:
    path = _volatile(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[Match]\nName={device}\n\n[Link]\nUnmanaged=yes\n")
    except OSError as error:
        raise refusal("can't write", path, error) from error


def name_servers(uplink: str) -> dict[str, list[str]]:
    """What systemd-resolved knows of this link, as words for `resolvectl VERB LINK WORDS…`."""
    if not Path("/run/systemd/resolve").is_dir() or shutil.which("resolvectl") is None:
        return {}
    found = {}
    for verb in ("dns", "domain", "default-route"):
        done = subprocess.run(
            ["resolvectl", verb, uplink], capture_output=True, text=True, check=False,
            timeout=_COMMAND_SECONDS,
        )  # fmt: skip
        found[verb] = done.stdout.partition("):")[2].split() if done.returncode == 0 else []
    return found


def _run(*command: str) -> None:
    """Raises: StateError with the last line of what it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StateError(f"'{' '.join(command)}' failed: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise StateError(
            f"'{' '.join(command)}' failed: {said}", hint=f"systemctl status {command[0]}"
        )
