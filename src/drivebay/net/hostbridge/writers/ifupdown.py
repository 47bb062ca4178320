"""ifupdown's /etc/network/interfaces: the uplink's stanzas become the bridge's.

Context: any; reads, and returns what should be. All other lines stay as they are, also the
comments. Without bridge-utils, which know `bridge_ports`, the bridge is made by `ip link`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from drivebay.errors import StateError
from drivebay.net.hostbridge.state import Before
from drivebay.net.hostbridge.writers.files import NewFile

__all__ = ["has_stanza", "ifupdown_files"]

MAIN: Final = "etc/network/interfaces"
_BRIDGE_UTILS: Final = "etc/network/if-pre-up.d/bridge"
_BEGINS: Final = re.compile(
    r"(iface|auto|allow-\S+|mapping|source|source-directory|no-auto-down|no-scripts|template|rename)"
    r"(\s|$)"
)


def has_stanza(root: Path, interface: str) -> bool:
    return any(_names(line, interface) for path in _sources(root) for line in _lines(path))


def ifupdown_files(before: Before, root: Path) -> list[NewFile]:
    """Raises: StateError when no stanza names the uplink."""
    made = _bridge_lines(before, root)
    files = []
    for path in _sources(root):
        old = _lines(path)
        new, used = _changed(old, before, made)
        if used:
            made = []  # the device is made once, by the first stanza
        if new != old:
            files.append(NewFile(path, "\n".join(new) + "\n"))
    if made:
        raise StateError(f"no stanza of /{MAIN} is about '{before.uplink.name}'")
    return files


def _changed(lines: list[str], before: Before, made: list[str]) -> tuple[list[str], bool]:
    """The file with the bridge in the uplink's place; whether a stanza of it took ``made``."""
    up, bridge = before.uplink.name, before.bridge
    vlans = {vlan.name for vlan in before.vlans}
    changed: list[str] = []
    used = False
    for head, *body in _stanzas(lines):
        words = head.split()
        if _names(head, up):
            if made and not used:
                changed += [f"iface {up} inet manual", ""]
            changed.append(_word(head, up, bridge))
            changed += [] if used else made
            changed += [_word(line, up, bridge) for line in body]
            used = used or bool(made)
        elif words[:1] == ["iface"] and words[1:2] and words[1] in vlans:
            raw = [line for line in body if re.match(r"\s*vlan[-_]raw[-_]device\b", line)]
            changed += [head, f"    vlan-raw-device {bridge}"]
            changed += [line for line in body if line not in raw]
        elif re.match(r"\s*(auto|allow-)", head):
            changed += [*_started(words, head, up, bridge), *body]
        else:
            changed += [head, *body]
    return changed, used


def _stanzas(lines: list[str]) -> list[list[str]]:
    """The lines in groups: each begins with the word that makes a stanza."""
    groups: list[list[str]] = []
    for line in lines:
        if not groups or _BEGINS.match(line.strip()):
            groups.append([])
        groups[-1].append(line)
    return groups


def _started(words: list[str], head: str, up: str, bridge: str) -> list[str]:
    """A line that says what is started: the bridge always, as nobody plugs it in."""
    if up not in words[1:]:
        return [head]
    if words[0] in ("auto", "allow-auto"):
        return [_word(head, up, bridge)]
    others = [word for word in words[1:] if word != up]
    return [*([" ".join([words[0], *others])] if others else []), f"auto {bridge}"]


def _bridge_lines(before: Before, root: Path) -> list[str]:
    up, bridge = before.uplink, before.bridge
    if (root / _BRIDGE_UTILS).exists():
        return [
            f"    bridge_ports {up.name}", "    bridge_stp off", "    bridge_fd 0",
            f"    bridge_hw {up.mac}",
        ]  # fmt: skip
    made = f"ip link add {bridge} address {up.mac} type bridge stp_state 0 forward_delay 0"
    return [
        f"    pre-up {made} || true",
        f"    pre-up ip link set {bridge} mtu {up.mtu}",
        f"    pre-up ip link set {up.name} master {bridge} up",
        f"    post-down ip link delete {bridge}",
    ]


def _names(line: str, interface: str) -> bool:
    words = line.split()
    return words[:2] == ["iface", interface]


def _word(line: str, old: str, new: str) -> str:
    """The line with a whole word exchanged; comments stay."""
    if line.lstrip().startswith("#"):
        return line
    return re.sub(rf"(?<![\w.:-]){re.escape(old)}(?![\w.-])", new, line)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    except UnicodeError as error:
        raise StateError(f"can't read '{path}': {error}") from error


def _sources(root: Path) -> list[Path]:
    """The main file and those that it sources, in ifupdown's order."""
    main = root / MAIN
    found = [main]
    for line in _lines(main):
        words = line.split()
        if words[:1] == ["source"] and len(words) > 1:
            for word in words[1:]:
                pattern = word if word.startswith("/") else f"/etc/network/{word}"
                found += sorted(
                    path for path in root.glob(pattern.lstrip("/"))
                    if path.is_file() and not path.name.startswith(".")
                )  # fmt: skip
        elif words[:1] == ["source-directory"] and len(words) > 1:
            folder = root / words[1].lstrip("/")
            found += sorted(path for path in folder.glob("*") if re.fullmatch(r"[\w-]+", path.name))
    return found
