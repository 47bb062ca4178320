"""vm/placement.py: nodes and cores as /sys shows them, and what is chosen of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from drivebay.vm.placement import (
    HostCores,
    Placement,
    choose,
    node_of,
    node_of_device,
    pin,
    read_host,
)

TWO = HostCores({0: frozenset({0, 1, 4, 5}), 1: frozenset({2, 3, 6, 7})}, frozenset(range(8)))
ONE = HostCores({0: frozenset(range(4))}, frozenset(range(4)))


@pytest.mark.parametrize(
    ("host", "node", "target", "cpus", "expected"),
    [
        # On the disk's node, beside the target's core there.
        (TWO, 1, {0, 2}, 2, Placement(1, (3, 6, 7), "0x4")),
        (TWO, 0, {0, 1}, 1, Placement(0, (4, 5), "0x3")),
        # More vCPUs than the node has cores: all that are not the target's.
        (TWO, 1, {0, 2}, 4, Placement(1, (1, 3, 4, 5, 6, 7), "0x4")),
        # No core of the target is on that node, so its controller may be on any.
        (TWO, 1, {0}, 2, Placement(1, (2, 3, 6, 7), None)),
        # A disk on no node, or on one without memory.
        (TWO, None, {0}, 2, Placement(None, (1, 2, 3, 4, 5, 6, 7), None)),
        (TWO, 5, {0}, 2, Placement(None, (1, 2, 3, 4, 5, 6, 7), None)),
        # One node: only the target's cores matter.
        (ONE, 0, {0}, 2, Placement(None, (1, 2, 3), None)),
        # Nothing is left, or nothing is to be said.
        (ONE, 0, {0, 1, 2, 3}, 2, Placement()),
        (ONE, 0, set(), 2, Placement()),
        # Fewer cores beside the target's than vCPUs: they may share the target's.
        (ONE, 0, {0, 1}, 3, Placement()),
        # Cores that this process may not use are nobody's to give.
        (HostCores(TWO.nodes, frozenset({0, 2, 3})), 1, {0}, 2, Placement(1, (2, 3), None)),
        (HostCores(), None, {0}, 1, Placement()),
    ],
)
def test_a_vm_is_near_its_disk_and_off_the_targets_cores(
    host: HostCores, node: int | None, target: set[int], cpus: int, expected: Placement
) -> None:
    assert choose(host, node, target, cpus) == expected


class Tree:
    """A /sys of a host with two nodes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text("devices/system/node/has_memory", "0-1")
        self.text("devices/system/node/node0/cpulist", "0-3,8-11")
        self.text("devices/system/node/node1/cpulist", "4-7")
        self.text("devices/system/node/node2/cpulist", "12")

    def text(self, path: str, text: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")

    def device(self, number: str, path: str) -> Path:
        folder = self.root / "devices" / path
        folder.mkdir(parents=True, exist_ok=True)
        link = self.root / "dev/block" / number
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
        return folder

    def stands_on(self, upper: Path, *lower: Path) -> None:
        (upper / "slaves").mkdir()
        for folder in lower:
            (upper / "slaves" / folder.name).symlink_to(folder)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_hosts_nodes_are_those_with_memory(tree: Tree) -> None:
    host = read_host(tree.root, {1, 2})
    assert host.nodes == {0: frozenset({0, 1, 2, 3, 8, 9, 10, 11}), 1: frozenset({4, 5, 6, 7})}
    assert host.allowed == {1, 2}


def test_a_host_that_says_nothing_has_no_nodes(tmp_path: Path) -> None:
    assert read_host(tmp_path).nodes == {}
    assert read_host(tmp_path).allowed == os.sched_getaffinity(0)


def test_a_disk_is_on_the_node_of_its_bus(tree: Tree) -> None:
    disk = tree.device("259:0", "pci0000:80/0000:80:01.0/nvme/nvme0/nvme0n1")
    tree.device("259:1", "pci0000:80/0000:80:01.0/nvme/nvme0/nvme0n1/nvme0n1p1")
    tree.text("devices/pci0000:80/0000:80:01.0/numa_node", "1")
    assert node_of_device("259:0", tree.root) == 1
    assert node_of_device("259:1", tree.root) == 1
    tree.text("devices/pci0000:80/0000:80:01.0/numa_node", "-1")
    assert node_of_device("259:0", tree.root) is None
    assert disk.is_dir()
    assert node_of_device("1:1", tree.root) is None


def test_devices_on_devices_are_where_these_are(tree: Tree) -> None:
    parts = [tree.device(f"8:{n}", f"pci{n}/0000:{n}0:00.0/block/sd{n}") for n in range(3)]
    for n, node in enumerate((0, 1, 1)):
        tree.text(f"devices/pci{n}/0000:{n}0:00.0/numa_node", str(node))
    mapped = tree.device("253:0", "virtual/block/dm-0")
    tree.stands_on(mapped, parts[1])
    array = tree.device("9:0", "virtual/block/md0")
    tree.stands_on(array, mapped, parts[2])
    tree.device("9:1", "virtual/block/md0/md0p1")
    mixed = tree.device("9:2", "virtual/block/md2")
    tree.stands_on(mixed, parts[0], parts[1])
    assert [node_of_device(number, tree.root) for number in ("253:0", "9:0", "9:1", "9:2")] == [
        1,
        1,
        1,
        None,
    ]


def test_an_nvme_disk_with_paths_is_where_its_controllers_are(tree: Tree) -> None:
    controller = tree.root / "devices/pci0000:80/0000:80:01.0/nvme/nvme0"
    controller.mkdir(parents=True)
    tree.text("devices/pci0000:80/0000:80:01.0/numa_node", "1")
    head = tree.device("259:0", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1")
    (head.parent / "nvme0").symlink_to(controller)
    assert node_of_device("259:0", tree.root) == 1


def test_devices_in_a_circle_come_to_an_end(tree: Tree) -> None:
    first, second = (tree.device(f"253:{n}", f"virtual/block/dm-{n}") for n in range(2))
    tree.stands_on(first, second)
    tree.stands_on(second, first)
    assert node_of_device("253:0", tree.root) is None


@pytest.mark.parametrize("text", ["", "x", "0-", "0;1", "99999999999-99999999999999"])
def test_a_list_that_is_none_is_empty(tree: Tree, text: str) -> None:
    tree.text("devices/system/node/has_memory", text)
    assert read_host(tree.root).nodes == {}


def test_a_files_disk_is_its_file_systems(tree: Tree, tmp_path: Path) -> None:
    file = tmp_path / "pool.img"
    file.touch()
    found = file.stat().st_dev
    tree.device(f"{os.major(found)}:{os.minor(found)}", "pci0000:80/0000:80:01.0/block/sda")
    tree.text("devices/pci0000:80/0000:80:01.0/numa_node", "1")
    assert node_of(file, tree.root) == 1
    assert node_of(tmp_path / "nowhere", tree.root) is None


def test_threads_are_kept_to_their_cores() -> None:
    core = max(os.sched_getaffinity(0))
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(30)
    native = thread.native_id
    assert native is not None
    try:
        before = os.sched_getaffinity(native)
        pin([native], Placement())
        assert os.sched_getaffinity(native) == before
        pin([1 << 22, native], Placement(None, (core,)))  # the first has ended: no such thread
        assert os.sched_getaffinity(native) == {core}
    finally:
        over.set()
        thread.join()
