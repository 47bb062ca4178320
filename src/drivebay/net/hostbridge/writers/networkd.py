"""systemd-networkd's files: the bridge's device, its network as the uplink's was, the uplink in it.

Context: any; reads, and returns what should be. The uplink's old file stays, since it may be
about other interfaces as well: ours come first in the order of their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from drivebay.errors import StateError
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.state import Before
from drivebay.net.hostbridge.writers.files import NewFile

__all__ = ["identity_lines", "networkd_files"]

FOLDER: Final = Path("etc/systemd/network")
_FIRST: Final = "00-drivebay"


def networkd_files(before: Before, manager: Manager, root: Path) -> list[NewFile]:
    """Raises: StateError when a file of the uplink would come before ours, or can't be read."""
    up, bridge = before.uplink, before.bridge
    source = root / manager.source.lstrip("/")
    if source.name < _FIRST:
        raise StateError(
            f"'{manager.source}' comes before any file of ours ({_FIRST}-…)",
            hint=f"mv {manager.source} {source.parent}/10-{source.name}",
        )
    folder = root / FOLDER
    text = "\n\n".join(_without_match(part) for part in _parts(source))
    network = f"[Match]\nName={bridge}\n\n{text.strip()}\n{identity_lines(manager)}"
    return [
        NewFile(
            folder / f"{_FIRST}-{bridge}.netdev",
            f"[NetDev]\nName={bridge}\nKind=bridge\nMACAddress={up.mac}\nMTUBytes={up.mtu}\n\n"
            "[Bridge]\nSTP=no\nForwardDelaySec=0\n",
        ),
        NewFile(folder / f"{_FIRST}-{bridge}.network", network),
        NewFile(
            folder / f"{_FIRST}-{up.name}.network",
            f"[Match]\nName={up.name}\n\n[Link]\nMTUBytes={up.mtu}\n\n"
            f"[Network]\nBridge={bridge}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        ),
    ]


def identity_lines(manager: Manager) -> str:
    """The number by which DHCP servers knew the uplink, so that they give the same address."""
    if manager.identity is None:
        return ""
    return f"\n[DHCPv4]\nIAID={manager.identity}\n\n[DHCPv6]\nIAID={manager.identity}\n"


def _parts(source: Path) -> list[str]:
    """The file and what is added to it, in networkd's order."""
    try:
        added = sorted(source.parent.joinpath(f"{source.name}.d").glob("*.conf"))
        return [path.read_text(encoding="utf-8") for path in (source, *added)]
    except (OSError, UnicodeError) as error:
        raise StateError(f"can't read '{source}', which configures the uplink: {error}") from error


def _without_match(text: str) -> str:
    """What a file says, but for which interface it is, and for this one's MAC."""
    kept: list[str] = []
    section = ""
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("["):
            section = bare
        key = bare.partition("=")[0].strip()
        if section == "[Match]" or (section == "[Link]" and key == "MACAddress"):
            continue
        kept.append(line)
    return "\n".join(kept).strip()
