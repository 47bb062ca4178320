"""Random writes, clears, snapshots, clones and inflations against bytes in a dict.

After each step the disk must say what the tables say: a kill at that point loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.bdev.lvol.path import LvolBdev
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.bdev.malloc import MallocBdev
from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.lvol import LvolMachine

CLUSTER_BYTES = 4096
CLUSTERS = 6
SIZE = CLUSTERS * CLUSTER_BYTES
SECTORS = SIZE // 512

ranges = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 20)).map(
    lambda pair: (pair[0], min(pair[1], SECTORS - pair[0]))
)
Step = tuple[str, int, list[tuple[int, int]]]
steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 7), st.lists(ranges, min_size=1, max_size=8)),
    st.tuples(st.just("zero"), st.integers(0, 7), st.lists(ranges, min_size=1, max_size=2)),
    st.tuples(st.sampled_from(["snapshot", "clone", "inflate", "discard"]), st.integers(0, 7),
              st.just([])),
)  # fmt: skip


@dataclass
class Volume:
    """One, and what it must read as; only the last of a chain is written to."""

    bdev: LvolBdev
    table: ClusterTable
    disks: list[BlkDriver]
    content: bytearray
    frozen: bool = False


class Scene:
    def __init__(self, machine: LvolMachine, external: bool) -> None:
        self.machine = machine
        self.volumes: list[Volume] = []
        self.fill = 0
        table = machine.cluster_table(CLUSTERS)
        self.external: MallocBdev | None = None
        content = bytearray(SIZE)
        if external:
            self.external = MallocBdev("E", None, 512, SECTORS - 11)
            content[: SIZE - 11 * 512] = bytes(i % 251 for i in range(SIZE - 11 * 512))
            machine.disk(self.external).write(0, bytes(content[: SIZE - 11 * 512]))
            table.set_external(machine.open_on(machine.reactor, self.external))
        self.add(table, content)

    def add(self, table: ClusterTable, content: bytearray) -> None:
        bdev = self.machine.volume(table, self.external)
        disks = [self.machine.disk(bdev, second=second) for second in (False, True)]
        self.volumes.append(Volume(bdev, table, disks, content))

    def write(self, volume: Volume, places: list[tuple[int, int]]) -> None:
        """All at once, on two reactors in turn; the ranges of one step must not overlap."""
        taken: set[int] = set()
        for number, (sector, count) in enumerate(places):
            if taken & set(range(sector, sector + count)):
                continue
            taken |= set(range(sector, sector + count))
            self.fill = self.fill % 255 + 1
            data = bytes([self.fill]) * (512 * count)
            volume.disks[number % 2].queue(Kind.OUT, sector, data)
            volume.content[sector * 512 : (sector + count) * 512] = data
        for disk in volume.disks:
            disk.publish()
        for disk in volume.disks:
            for pending in list(disk.pending.values()):
                assert disk.wait(pending).status == 0

    def zero(self, volume: Volume, places: list[tuple[int, int]]) -> None:
        for sector, count in places:
            volume.disks[0].write_zeroes(sector, count)
            volume.content[sector * 512 : (sector + count) * 512] = bytes(512 * count)

    def discard(self, volume: Volume) -> None:
        """Its own clusters read as zeroes on a malloc disk, the rest as before."""
        volume.disks[1].discard(0, SECTORS)
        for index, cluster in enumerate(volume.table.clusters):
            if cluster:
                at = index * CLUSTER_BYTES
                volume.content[at : at + CLUSTER_BYTES] = bytes(CLUSTER_BYTES)

    def snapshot(self, volume: Volume) -> None:
        old = self.machine.cluster_table(CLUSTERS)
        old.swap(volume.table)
        self.machine.settle(self.machine.space.freeze())
        if volume.table.parent is not None:
            old.set_parent(volume.table.parent)
        elif volume.table.external:
            old.set_external(volume.table.external_channel)
        volume.table.set_parent(old)
        self.machine.settle(self.machine.space.thaw())
        self.add(old, bytearray(volume.content))
        self.volumes[-1].frozen = True

    def clone(self, snapshot: Volume) -> None:
        table = self.machine.cluster_table(CLUSTERS)
        table.set_parent(snapshot.table)
        self.add(table, bytearray(snapshot.content))

    def inflate(self, volume: Volume) -> None:
        answers = [self.machine.space.touch(volume.table, index) for index in range(CLUSTERS)]
        assert {self.machine.settle(answer) for answer in answers} == {0}
        assert volume.table.allocated == CLUSTERS
        volume.table.set_parent(None)

    def step(self, what: str, which: int, places: list[tuple[int, int]]) -> None:
        volume = self.volumes[which % len(self.volumes)]
        if what == "clone":
            if volume.frozen and len(self.volumes) < 7:
                self.clone(volume)
        elif not volume.frozen:
            if what == "write":
                self.write(volume, places)
            elif what == "zero":
                self.zero(volume, places)
            elif what == "discard":
                self.discard(volume)
            elif what == "inflate":
                self.inflate(volume)
            elif len(self.volumes) < 7:
                self.snapshot(volume)

    def check(self) -> None:
        for number, volume in enumerate(self.volumes):
            assert volume.disks[number % 2].read(0, SIZE) == volume.content


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(st.booleans(), st.booleans(), st.lists(steps, min_size=1, max_size=10))
def test_volumes_read_as_the_model_says(external: bool, zeroed: bool, plan: list[Step]) -> None:
    with LvolMachine(cluster_bytes=CLUSTER_BYTES, zeroed=zeroed) as machine:
        scene = Scene(machine, external)
        for what, which, places in plan:
            scene.step(what, which, places)
            scene.check()
        tables = [volume.table for volume in scene.volumes]
        owned = [cluster for table in tables for cluster in table.clusters if cluster]
        assert len(owned) == len(set(owned))
        machine.settle(machine.space.freeze())
        assert machine.space.free.free == machine.space.free.total - 16 - len(owned)
        machine.settle(machine.space.thaw())
