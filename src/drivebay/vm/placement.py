"""Where a VM's memory, its vCPUs and its disks' controllers should be: NUMA nodes and cores.

Context: any. `read_host` and `node_of` read /sys, `choose` only computes, `pin` moves threads.

On a host with several nodes, the one whose bus has the disk is nearest to everything: the disk
writes into guest memory, and the guest's processors and the target's core read it there. The
target's cores belong to the target as long as there are others for the guest.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["HostCores", "Placement", "choose", "node_of", "pin", "read_host"]

_SYS: Final = Path("/sys")
_LAYERS_MOST: Final = 8  # of devices on devices


@dataclass(frozen=True)
class HostCores:
    """The host's NUMA nodes that have memory, with their cores; and the cores we may use."""

    nodes: Mapping[int, frozenset[int]] = field(default_factory=dict)
    allowed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Placement:
    """``node`` None and no cores: the kernel decides, as without us."""

    node: int | None = None  # for guest memory, preferred
    vcpu_cores: tuple[int, ...] = ()
    controller_mask: str | None = None  # for vhost_create_blk_controller


def choose(
    host: HostCores, disk_node: int | None, target_cores: Collection[int], cpus: int
) -> Placement:
    """Place a VM of ``cpus`` processors whose disk is on ``disk_node`` (None: on no node).

    vCPUs stay on the node if it has a core for each, else off the target's cores if that
    leaves a core for each, and else may use them all: a target that is idle needs none.
    """
    node = disk_node if len(host.nodes) > 1 and disk_node in host.nodes else None
    free = host.allowed - frozenset(target_cores)
    near: frozenset[int] = frozenset()
    mask = None
    if node is not None:
        near = free & host.nodes[node]
        mask = _mask(host.nodes[node] & frozenset(target_cores))
    cores = near if len(near) >= cpus else free
    if len(cores) < cpus or cores == host.allowed:
        cores = frozenset()
    return Placement(node, tuple(sorted(cores)), mask)


def _mask(cores: Iterable[int]) -> str | None:
    number = sum(1 << core for core in cores)
    return f"{number:#x}" if number else None


def pin(threads: Iterable[int], placement: Placement) -> None:
    """Let threads (query-cpus-fast names those of vCPUs) run on the placement's cores only.

    One that has ended, and cores that were taken from us since, are no reason to stop.
    """
    if not placement.vcpu_cores:
        return
    for thread in threads:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread, placement.vcpu_cores)


# ---- what /sys says -----------------------------------------------------------------------------


def read_host(sys: Path = _SYS, allowed: Iterable[int] | None = None) -> HostCores:
    """The host's nodes; ``allowed`` is by default what this process may use."""
    home = sys / "devices/system/node"
    with_memory = _read_list(home / "has_memory")
    nodes = {number: _read_list(home / f"node{number}/cpulist") for number in sorted(with_memory)}
    return HostCores(nodes, frozenset(os.sched_getaffinity(0) if allowed is None else allowed))


def node_of(path: Path, sys: Path = _SYS) -> int | None:
    """The node of the disk that is, or that holds, ``path``; None where none is known."""
    try:
        found = path.stat()
    except OSError:
        return None
    number = found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev
    return node_of_device(f"{os.major(number)}:{os.minor(number)}", sys)


def node_of_device(number: str, sys: Path = _SYS) -> int | None:
    """The node of the block device MAJOR:MINOR, or of all the devices that it stands on."""
    folder = sys / "dev/block" / number
    try:
        return _node_below(folder.resolve(strict=True), sys, _LAYERS_MOST)
    except OSError:  # a file system that is on no device of its own
        return None


def _node_below(folder: Path, sys: Path, layers: int) -> int | None:
    """A device's own folder or one above it, up to its bus, has the number; -1 is none."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            node = int((place / "numa_node").read_text())
            if node >= 0:
                return node
        if place == sys:
            break
    if layers == 0:
        return None
    return _common_node(_lower_devices(folder), sys, layers - 1)


def _lower_devices(folder: Path) -> list[Path]:
    """What a device mapper or an array stands on, also under a partition; an NVMe disk's paths."""
    homes = [folder / "slaves", folder.parent / "slaves"]
    links = [link for home in homes if home.is_dir() for link in home.iterdir()]
    if folder.parent.name.startswith("nvme-subsys"):
        links += [link for link in folder.parent.glob("nvme[0-9]*") if link.is_symlink()]
    return [link.resolve() for link in links]


def _common_node(folders: Collection[Path], sys: Path, layers: int) -> int | None:
    nodes = {_node_below(folder, sys, layers) for folder in folders}
    return nodes.pop() if len(nodes) == 1 else None


def _read_list(path: Path) -> frozenset[int]:
    """Read a list as the kernel writes it: '0-3,8'. Empty where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return frozenset()
    cores: set[int] = set()
    for part in text.split(","):
        if re.fullmatch(r"\d{1,5}(-\d{1,5})?", part, re.ASCII):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
