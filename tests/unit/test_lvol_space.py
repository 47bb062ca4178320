"""The owner's side of first writes: full stores, freezing, control's part, failures, durability."""

from __future__ import annotations

import errno
from pathlib import Path
from uuid import uuid4

import pytest

from drivebay.bdev.error import ErrorBdev
from drivebay.bdev.file import FileBdev
from drivebay.bdev.lvol.free_map import FreeMap
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.errors import HostError, InternalError, StateError, UsageError
from tests.fakes.driver import Kind, Status
from tests.fakes.lvol import LvolMachine
from tests.fakes.stepped import malloc_bdev
from tests.unit.test_lvol_path import CLUSTER, K16, base_ops, pattern, start_writes, status_of_write


def test_a_full_store_fails_what_needs_a_cluster_and_nothing_else() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(80)
        disk = machine.disk(machine.volume(table), size=256)
        free = machine.space.free.free
        writes = start_writes(disk, [n * CLUSTER for n in range(free + 5)], pattern(512))
        disk.wait_all()
        statuses = [write.completion.status for write in writes if write.completion]
        assert statuses.count(Status.OK) == free
        assert statuses.count(Status.IOERR) == 5
        assert (machine.space.free.free, machine.fulls) == (0, 1)
        disk.write(0, pattern(512, 2))
        assert disk.read(0, 512) == pattern(512, 2)
        assert status_of_write(disk, 79 * CLUSTER, pattern(512)) == Status.IOERR
        assert machine.fulls == 1
        machine.settle(machine.space.freeze())
        assert machine.space.free.release(table, 0, 2)
        machine.settle(machine.space.thaw())
        for sector in (0, CLUSTER):
            disk.write(sector, pattern(512, 3))
        assert status_of_write(disk, 79 * CLUSTER, pattern(512)) == Status.IOERR
        assert machine.fulls == 2
        machine.check_disk(table)


def test_while_frozen_first_writes_wait_and_the_rest_goes_on() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(8)
        volume = machine.volume(table)
        disk, other = machine.disk(volume), machine.disk(volume, second=True)
        disk.write(0, pattern(512))
        machine.settle(machine.space.freeze())
        waiting = start_writes(disk, [CLUSTER], pattern(512)) + start_writes(
            other, [CLUSTER + 1], pattern(512)
        )
        disk.write(1, pattern(512, 2))
        assert other.read(0, 1024) == pattern(512) + pattern(512, 2)
        machine.step(20)
        assert all(write.completion is None for write in waiting)
        assert table.allocated == 1
        machine.settle(machine.space.thaw())
        disk.wait_all()
        other.wait_all()
        assert disk.read(CLUSTER, 1024) == pattern(512) * 2
        machine.check_disk(table)


def test_a_freeze_in_the_middle_waits_for_what_is_in_flight() -> None:
    """At each turn between the first writes and their end."""
    for turns in range(12):
        with LvolMachine(zeroed=False) as machine:
            table = machine.cluster_table(8)
            disk = machine.disk(machine.volume(table))
            disk.write(0, pattern(512))
            start_writes(disk, [n * CLUSTER for n in range(1, 8)], pattern(512))
            machine.step(turns)
            machine.settle(machine.space.freeze())
            machine.check_disk(table)
            machine.settle(machine.space.thaw())
            disk.wait_all()
            assert table.allocated == 8
            machine.check_disk(table)


def test_only_a_frozen_space_is_controls() -> None:
    with LvolMachine() as machine:
        free, table = machine.space.free, machine.cluster_table(4)
        for change in (
            lambda: free.used,
            lambda: free.zeroed,
            free.recount,
            lambda: free.grow(100),
            lambda: free.allocate(table, 0, 1),
            lambda: free.release(table, 0, 1),
            lambda: free.mark_zeroed(0, 1),
            machine.space.wants,
        ):
            with pytest.raises(InternalError, match="frozen"):
                change()
        assert free.total == 64
        assert free.is_used(3)
        assert not free.is_used(4)
        assert not free.is_used(1 << 40)


def test_an_extent_page_is_asked_for_once_and_failed_writes_give_their_clusters_back() -> None:
    with LvolMachine(cluster_bytes=4096, size_bytes=8 << 20) as machine:
        table = machine.cluster_table(1200)
        disk = machine.disk(machine.volume(table))
        machine.serving = False
        writes = start_writes(disk, [0, 1, 8, 8 * 600], pattern(512))
        machine.step(10)
        assert machine.needs == 1 or machine.needs == 2
        machine.settle(machine.space.freeze())
        assert {(found is table, index) for found, index, _ in machine.space.wants()} == {
            (True, 0), (True, 1), (True, 600)
        }  # fmt: skip
        machine.settle(machine.space.thaw())  # nothing was served
        disk.wait_all()
        assert {write.completion.status for write in writes if write.completion} == {Status.IOERR}
        assert machine.space.free.free == machine.space.free.total - 16
        machine.needs, machine.serving = 0, True
        start_writes(disk, [0, 1, 8, 8 * 600], pattern(512))
        disk.wait_all()
        machine.check_disk(table)


def test_a_table_of_run_lengths_is_saved_by_control() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(8, extent_table=False)
        assert table.extent_pages is None
        disk = machine.disk(machine.volume(table))
        start_writes(disk, [0, 1, 3 * CLUSTER, 5 * CLUSTER - 1], pattern(1024))
        disk.wait_all()
        assert table.allocated == 4
        assert disk.read(3 * CLUSTER, 1024) == pattern(1024)
        machine.serving = False
        lost = start_writes(disk, [7 * CLUSTER], pattern(512))
        machine.step(10)
        machine.settle(machine.space.freeze())
        ((found, index, cluster),) = machine.space.wants()
        assert (found, index) == (table, 7)
        assert cluster
        machine.settle(machine.space.thaw())  # it could not be saved
        assert disk.wait(lost[0]).status == Status.IOERR
        assert not machine.space.free.is_used(cluster)
        assert table.get(7) == 0


def test_touch_allocates_and_copies_without_a_write() -> None:
    with LvolMachine() as machine:
        snapshot, table = machine.cluster_table(3), machine.cluster_table(3)
        machine.disk(machine.volume(snapshot)).write(CLUSTER, pattern(K16))
        table.set_parent(snapshot)
        disk = machine.disk(machine.volume(table))
        answers = [machine.space.touch(table, index) for index in (0, 1, 1)]
        assert [machine.settle(answer) for answer in answers] == [0, 0, 0]
        assert table.allocated == 2
        table.set_parent(None)
        assert disk.read(0, 3 * K16) == bytes(K16) + pattern(K16) + bytes(K16)
        assert machine.settle(machine.space.touch(table, 3)) == -errno.EIO
        machine.check_disk(snapshot, table)


def test_a_snapshot_is_a_change_of_tables_while_quiesced() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(4)
        volume = machine.volume(table)
        disk = machine.disk(volume)
        channel = machine._dead_channels[-1]
        disk.write(0, pattern(2 * K16))
        gate = channel.gate()
        machine.settle(gate)
        held = start_writes(disk, [1], pattern(512, 9))
        machine.step(5)
        assert held[0].completion is None
        old = machine.cluster_table(4)
        old.swap(table)
        table.set_parent(old)
        machine.settle(channel.ungate())
        disk.wait_all()
        frozen = machine.disk(machine.volume(old, readonly=True))
        assert frozen.read(0, 2 * K16) == pattern(2 * K16)
        assert disk.read(0, 1024) == pattern(512) + pattern(512, 9)
        assert (old.allocated, table.allocated) == (2, 1)
        with pytest.raises(UsageError, match="run lengths"):
            table.swap(machine.cluster_table(4, extent_table=False))


def test_a_gate_waits_for_writes_across_clusters_that_wait_for_theirs() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(8)
        disk = machine.disk(machine.volume(table))
        channel = machine._dead_channels[-1]
        start_writes(disk, [CLUSTER - 1], pattern(4 * K16))
        machine.step(1)
        machine.settle(channel.gate())
        machine.settle(channel.ungate())
        disk.wait_all()
        assert disk.read(CLUSTER - 1, 4 * K16) == pattern(4 * K16)
        machine.check_disk(table)


def test_with_a_cache_below_what_is_promised_is_stable(tmp_path: Path) -> None:
    """A stable write to a cluster whose page may be lost flushes; one flush serves all."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    base = FileBdev("F", None, str(path), 512, module="uring")
    with LvolMachine(base=base, zeroed=False) as machine:
        table = machine.cluster_table(16)
        volume = machine.volume(table)
        assert volume.write_cache
        machine.write_through = False
        disk = machine.disk(volume)
        machine.write_through = True
        stable = machine.disk(volume)
        raw_flushes = base_ops(machine, "flush")
        start_writes(disk, [n * CLUSTER for n in range(8)], pattern(512))
        disk.wait_all()
        cleared = base_ops(machine, "flush") - raw_flushes
        assert 1 <= cleared <= 8  # cleared clusters are flushed before a page names them
        stable.write(1, pattern(512, 2))  # its page is in the cache
        assert base_ops(machine, "flush") - raw_flushes == cleared + 1
        stable.write(1, pattern(512, 3))
        assert base_ops(machine, "flush") - raw_flushes == cleared + 1
        disk.write(9 * CLUSTER, pattern(512))
        after = base_ops(machine, "flush")
        disk.flush()
        assert base_ops(machine, "flush") == after + 1
        stable.write(9 * CLUSTER, pattern(512, 4))
        assert base_ops(machine, "flush") == after + 1
        assert disk.read(9 * CLUSTER, 512) == pattern(512, 4)
        assert disk.read(0, 1024) == pattern(512) + pattern(512, 3)
        machine.check_disk(table)


def test_a_base_that_fails_costs_the_write_and_no_cluster(tmp_path: Path) -> None:
    """The copy of a cluster fails: its snapshot lies past the end of the base."""
    with LvolMachine() as machine:
        snapshot, table = machine.cluster_table(4), machine.cluster_table(4)
        snapshot.set(1, 1 << 20)
        table.set_parent(snapshot)
        disk = machine.disk(machine.volume(table))
        free = machine.space.free.free
        assert status_of_write(disk, CLUSTER, pattern(512)) == Status.IOERR
        assert disk.request(Kind.OUT, CLUSTER, pattern(512)).status == Status.IOERR
        assert (machine.space.free.free, table.allocated) == (free, 0)
        disk.write(0, pattern(512))


def failing_machine() -> LvolMachine:
    return LvolMachine(
        cluster_bytes=4096, base=ErrorBdev("E", uuid4(), malloc_bdev(size_bytes=16 << 20))
    )


def fail_writes(machine: LvolMachine, count: int) -> None:
    assert isinstance(machine.bdev, ErrorBdev)
    machine.bdev.inject("write", "failure", count)


def test_a_page_that_could_not_be_written_is_written_again_before_the_next_first_write() -> None:
    """Its clusters are nobody's until then: the disk may say that they are this volume's."""
    with failing_machine() as machine:
        table, other = machine.cluster_table(600), machine.cluster_table(8)
        disks = [machine.disk(machine.volume(one)) for one in (table, other)]
        for disk in disks:
            disk.write(0, pattern(512))
        free = machine.space.free.free
        machine.mending = False
        fail_writes(machine, 1)
        assert status_of_write(disks[0], 8, pattern(512)) == Status.IOERR
        assert machine.space.free.free == free - 1
        for disk in disks:  # control tries, and can't yet
            assert status_of_write(disk, 16, pattern(512)) == Status.IOERR
            disk.write(1, pattern(512, 2))  # the rest goes on
        machine.settle(machine.space.freeze())
        assert machine.space.failed_pages() == [(table, 0)]
        machine.settle(machine.space.thaw())
        assert machine.space.free.free == free - 1
        machine.mending = True
        disks[1].write(16, pattern(512, 3))
        assert machine.space.free.free == free - 1  # the lost one came back, this one went
        disks[0].write(8, pattern(512, 4))
        assert disks[0].read(0, 4096 + 512) == (
            pattern(512) + pattern(512, 2) + bytes(3072) + pattern(512, 4)
        )
        machine.check_disk(table, other)


def test_all_pages_fail_at_once_and_nothing_waits_for_ever() -> None:
    """More than can be written at the same time."""
    with failing_machine() as machine:
        table = machine.cluster_table(40 * 512)
        disk = machine.disk(machine.volume(table))
        for page in range(40):
            disk.write(page * 512 * 8, pattern(512))
        free = machine.space.free.free
        machine.mending = False
        fail_writes(machine, 1000)
        writes = start_writes(disk, [(page * 512 + 1) * 8 for page in range(40)], pattern(512))
        disk.wait_all()
        assert {write.completion.status for write in writes if write.completion} == {Status.IOERR}
        machine.settle(machine.space.freeze())
        assert 1 <= len(machine.space.failed_pages()) <= 16
        assert machine.space.free.free == free - len(machine.space.failed_pages())
        machine.settle(machine.space.thaw())
        assert isinstance(machine.bdev, ErrorBdev)
        machine.bdev.clear("write")
        machine.mending = True
        start_writes(disk, [(page * 512 + 1) * 8 for page in range(40)], pattern(512))
        disk.wait_all()
        assert table.allocated == 80
        machine.check_disk(table)


def test_a_barred_space_gives_no_clusters_and_asks_control_each_time() -> None:
    with LvolMachine() as machine:
        tables = [machine.cluster_table(8, extent_table=pages) for pages in (True, False)]
        disks = [machine.disk(machine.volume(table)) for table in tables]
        for disk in disks:
            disk.write(0, pattern(512))
        machine.settle(machine.space.freeze())
        machine.settle(machine.space.thaw(barred=True))
        free, machine.serving = machine.space.free.free, False
        for disk in disks:
            machine.needs = 0
            writes = start_writes(disk, [CLUSTER], pattern(512))
            machine.step(10)
            assert machine.needs == 1
            machine.settle(machine.space.freeze())
            machine.settle(machine.space.thaw(barred=True))
            assert disk.wait(writes[0]).status == Status.IOERR
            disk.write(1, pattern(512))
        assert machine.space.free.free == free
        machine.needs, machine.serving = 0, True
        for disk in disks:
            disk.write(CLUSTER, pattern(512))
        assert [table.allocated for table in tables] == [2, 2]


# --- the map of free clusters --------------------------------------------------------------


def test_the_lowest_free_clusters_are_taken() -> None:
    free = FreeMap(200)
    table = ClusterTable(150, 1)
    free.used[0] = 0b0000_0111
    free.used[8] = 0xFF
    free.recount()
    assert free.free == 200 - 11
    free.mark_zeroed(0, 100)
    assert free.allocate(table, 10, 120) == [(100, 41 - 10)]
    assert list(table.clusters[10:14]) == [3, 4, 5, 6]
    assert 64 not in table.clusters
    assert free.release(table, 11, 2) == [(4, 2)]
    assert table.allocated == 118
    other = ClusterTable(3, 2)
    free.allocate(other, 0, 3)
    assert list(other.clusters)[:2] == [4, 5]


def test_nothing_is_allocated_when_not_all_can_be() -> None:
    free = FreeMap(10)
    table = ClusterTable(20, 1)
    with pytest.raises(HostError, match="11 clusters are needed, 10 are free") as caught:
        free.allocate(table, 0, 11)
    assert caught.value.errno == errno.ENOSPC
    assert (free.free, table.allocated) == (10, 0)
    free.allocate(table, 5, 10)
    assert free.free == 0
    for first, count in ((0, 21), (20, 1), (1 << 63, 1), (1, 1 << 63)):
        with pytest.raises((IndexError, OverflowError)):
            free.allocate(table, first, count)
        with pytest.raises((IndexError, OverflowError)):
            free.release(table, first, count)


def test_a_map_grows_and_does_not_shrink() -> None:
    free = FreeMap(10)
    free.used[1] = 0xFF  # bits past the end mean nothing
    free.recount()
    assert free.free == 8
    free.grow(70)
    assert (free.total, free.free) == (70, 68)
    assert free.is_used(9)
    assert not free.is_used(10)
    with pytest.raises(StateError):
        free.grow(69)
