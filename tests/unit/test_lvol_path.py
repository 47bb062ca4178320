"""Volumes on a store in memory: where their clusters come from, and what is read where none is."""

from __future__ import annotations

import itertools

import pytest

from drivebay.bdev.base import Bdev
from drivebay.bdev.malloc import MallocBdev
from tests.fakes.driver import BlkDriver, Kind, Pending, Status, segment_bytes
from tests.fakes.lvol import LvolMachine

K16 = 16 << 10
CLUSTER = K16 // 512  # sectors


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((i * 7 + (i >> 9) + seed) & 255 or 1 for i in range(length))


def base_ops(machine: LvolMachine, operation: str) -> int:
    return machine.bdev.iostat()[operation].ops


def start_writes(disk: BlkDriver, sectors: list[int], data: bytes) -> list[Pending]:
    pending = [disk.queue(Kind.OUT, sector, data) for sector in sectors]
    disk.publish()
    return pending


def status_of_write(disk: BlkDriver, sector: int, data: bytes) -> int:
    return disk.request(Kind.OUT, sector, data).status


@pytest.mark.parametrize("cluster_bytes", [K16, 12 << 10, 4096])
def test_what_is_written_is_read_and_on_disk(cluster_bytes: int) -> None:
    with LvolMachine(cluster_bytes=cluster_bytes) as machine:
        table = machine.cluster_table(20)
        disk = machine.disk(machine.volume(table))
        size = 20 * cluster_bytes
        model = bytearray(size)
        assert disk.read(0, size) == bytes(size)
        sectors = cluster_bytes // 512
        for start, length in [
            (0, 512),
            (sectors - 1, 1024),
            (3 * sectors, 5 * cluster_bytes),
            (size // 512 - 2, 1024),
            (2 * sectors + 1, 3 * cluster_bytes),
        ]:
            data = pattern(length, start)
            disk.write(start, data)
            model[start * 512 : start * 512 + length] = data
        assert disk.read(0, size) == model
        assert disk.read(sectors - 1, 4096) == model[(sectors - 1) * 512 :][:4096]
        machine.check_disk(table)


def test_first_writes_of_one_turn_share_one_page_write() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(40)
        disk = machine.disk(machine.volume(table))
        disk.write(0, pattern(512))
        before = base_ops(machine, "write")
        start_writes(disk, [(1 + i) * CLUSTER for i in range(32)], pattern(512))
        disk.wait_all()
        assert table.allocated == 33
        assert base_ops(machine, "write") - before == 32 + 1
        machine.check_disk(table)


def test_one_cluster_written_from_two_reactors_at_once_is_allocated_once() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(8)
        volume = machine.volume(table)
        disks = [machine.disk(volume), machine.disk(volume, second=True)]
        for disk in disks:
            half = disks.index(disk) * 16
            for part in range(16):
                disk.queue(Kind.OUT, 2 * CLUSTER + half + part, pattern(512, half + part))
            for cluster in (4, 5):
                disk.queue(Kind.OUT, cluster * CLUSTER + half, pattern(512, cluster + half))
        for disk in disks:
            disk.publish()
        for disk in disks:
            disk.wait_all()
        assert table.allocated == 3
        for part in range(32):
            for disk in disks:
                assert disk.read(2 * CLUSTER + part, 512) == pattern(512, part)
        assert disks[0].read(5 * CLUSTER + 16, 512) == pattern(512, 21)
        machine.check_disk(table)


def test_more_clusters_than_a_channel_can_ask_for_at_once() -> None:
    with LvolMachine(cluster_bytes=4096) as machine:
        table = machine.cluster_table(200)
        disk = machine.disk(machine.volume(table), size=512)
        start_writes(disk, [8 * i for i in range(150)], pattern(512))
        disk.wait_all()
        assert table.allocated == 150
        assert all(disk.read(8 * i, 4096) == pattern(512) + bytes(3584) for i in range(150))
        machine.check_disk(table)


def test_clusters_side_by_side_are_one_request_for_the_base() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(8)
        machine.settle(machine.space.freeze())
        assert machine.space.free.allocate(table, 0, 8) == []
        machine.settle(machine.space.thaw())
        disk = machine.disk(machine.volume(table))
        before = base_ops(machine, "write")
        disk.write(3, pattern(6 * K16))
        assert base_ops(machine, "write") == before + 1
        assert disk.read(3, 6 * K16) == pattern(6 * K16)


def test_a_clone_of_a_clone_reads_what_is_nearest_and_copies_it() -> None:
    with LvolMachine() as machine:
        tables = [machine.cluster_table(n) for n in (4, 6, 8)]
        for below, above in itertools.pairwise(tables):
            above.set_parent(below)
        bottom, middle, top = (machine.disk(machine.volume(table)) for table in tables)
        for sector in range(4):
            bottom.write(sector * CLUSTER, pattern(K16, 10 + sector))
        middle.write(1 * CLUSTER + 3, pattern(1024, 50))
        middle.write(5 * CLUSTER, pattern(512, 51))
        expected = [pattern(K16, 10 + n) for n in range(4)] + [bytes(K16)] * 4
        expected[1] = expected[1][:1536] + pattern(1024, 50) + expected[1][2560:]
        expected[5] = pattern(512, 51) + bytes(K16 - 512)
        assert top.read(0, 8 * K16) == b"".join(expected)
        top.write(1 * CLUSTER + 9, pattern(512, 60))
        top.write(3 * CLUSTER - 1, pattern(1024, 61))
        top.write(7 * CLUSTER + 8, pattern(512, 62))
        whole = bytearray(b"".join(expected))
        for sector, length, seed in [
            (CLUSTER + 9, 512, 60),
            (3 * CLUSTER - 1, 1024, 61),
            (7 * CLUSTER + 8, 512, 62),
        ]:
            whole[sector * 512 : sector * 512 + length] = pattern(length, seed)
        assert top.read(0, 8 * K16) == whole
        assert bottom.read(0, 4 * K16) == b"".join(pattern(K16, 10 + n) for n in range(4))
        assert [table.allocated for table in tables] == [4, 2, 4]
        machine.check_disk(*tables)


def test_what_lies_past_the_end_of_a_parent_is_zeroes() -> None:
    """Also when the parent's own parent was longer, before the parent was cut short."""
    with LvolMachine() as machine:
        grandparent, parent, table = (machine.cluster_table(n) for n in (6, 2, 6))
        old = machine.disk(machine.volume(grandparent))
        old.write(4 * CLUSTER, pattern(K16))
        parent.set_parent(grandparent)
        table.set_parent(parent)
        disk = machine.disk(machine.volume(table))
        assert disk.read(0, 6 * K16) == bytes(6 * K16)
        disk.write(4 * CLUSTER, pattern(512))
        assert disk.read(4 * CLUSTER, K16) == pattern(512) + bytes(K16 - 512)


def test_clusters_that_held_something_are_cleared_before_they_are_used() -> None:
    with LvolMachine(zeroed=False) as machine:
        raw = machine.disk(machine.bdev)
        raw.write(RESERVED_SECTORS, pattern(256 << 10))
        table = machine.cluster_table(8)
        disk = machine.disk(machine.volume(table))
        disk.write(2, pattern(512))
        disk.write(3 * CLUSTER - 1, pattern(1024))
        expected = bytearray(4 * K16)
        expected[1024:1536] = pattern(512)
        at = (3 * CLUSTER - 1) * 512
        expected[at : at + 1024] = pattern(1024)
        assert disk.read(0, 4 * K16) == expected


RESERVED_SECTORS = (64 << 10) // 512


def test_a_large_cluster_is_copied_in_pieces() -> None:
    mib = 1 << 20
    with LvolMachine(cluster_bytes=mib, size_bytes=16 * mib, zeroed=False) as machine:
        snapshot, table = machine.cluster_table(4), machine.cluster_table(4)
        old = machine.disk(machine.volume(snapshot))
        data = pattern(mib)
        old.write(2 * mib // 512, data)
        table.set_parent(snapshot)
        disk = machine.disk(machine.volume(table))
        start_writes(disk, [(n * mib + 300_032) // 512 for n in range(4)], pattern(512, 9))
        disk.wait_all()
        for n in range(4):
            expected = bytearray(data if n == 2 else bytes(mib))
            expected[300_032:300_544] = pattern(512, 9)
            assert disk.read(n * mib // 512, mib) == expected
        machine.check_disk(snapshot, table)


def test_a_long_read_of_nothing_is_zeroes() -> None:
    kib = 1 << 10
    with LvolMachine(cluster_bytes=512 * kib, size_bytes=4096 * kib) as machine:
        disk = machine.disk(machine.volume(machine.cluster_table(5)))
        assert disk.read(0, 1536 * kib) == bytes(1536 * kib)
        disk.write(1536 * kib // 512, pattern(512))
        assert disk.read(512 * kib // 512, 1536 * kib) == (
            bytes(1024 * kib) + pattern(512) + bytes(512 * kib - 512)
        )


# --- a snapshot from elsewhere -------------------------------------------------------------


def external_scene(machine: LvolMachine, blocks: int) -> tuple[Bdev, bytes]:
    external = MallocBdev("E", None, 512, blocks)
    raw = machine.disk(external)
    content = pattern(blocks * 512, 77)
    raw.write(0, content)
    return external, content


@pytest.mark.parametrize("blocks", [3 * CLUSTER, 3 * CLUSTER + 5])
def test_a_clone_of_another_bdev_reads_it_and_zeroes_past_its_end(blocks: int) -> None:
    with LvolMachine() as machine:
        external, content = external_scene(machine, blocks)
        table = machine.cluster_table(6)
        table.set_external(machine.open_on(machine.reactor, external))
        volume = machine.volume(table, external)
        disk, other = machine.disk(volume), machine.disk(volume, second=True)
        model = bytearray(content.ljust(6 * K16, b"\0"))
        assert disk.read(0, 6 * K16) == model
        assert disk.read(3 * CLUSTER - 2, 8192) == model[(3 * CLUSTER - 2) * 512 :][:8192]
        for sector, length, each in [
            (CLUSTER + 1, 512, disk),
            (3 * CLUSTER + 7, 1024, other),
            (5 * CLUSTER - 1, 1024, disk),
        ]:
            each.write(sector, pattern(length, sector))
            model[sector * 512 : sector * 512 + length] = pattern(length, sector)
        assert disk.read(0, 6 * K16) == model
        assert other.read(0, 6 * K16) == model
        assert table.allocated == 4
        machine.check_disk(table)


def test_without_the_other_bdev_what_lies_there_is_an_error() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(4)
        table.set_external(None)
        disk = machine.disk(machine.volume(table))
        assert disk.request(Kind.IN, 0, room=512).status == Status.IOERR
        assert status_of_write(disk, 0, pattern(512)) == Status.IOERR
        table.set(1, 9)
        disk.write(CLUSTER, pattern(512))
        assert disk.read(CLUSTER, 512) == pattern(512)


# --- the other operations ------------------------------------------------------------------


def test_clearing_allocates_only_where_a_parent_has_data() -> None:
    with LvolMachine() as machine:
        snapshot, table = machine.cluster_table(4), machine.cluster_table(4)
        machine.disk(machine.volume(snapshot)).write(CLUSTER, pattern(K16))
        table.set_parent(snapshot)
        disk = machine.disk(machine.volume(table))
        disk.write_zeroes(0, 4 * CLUSTER)
        assert table.allocated == 1
        assert disk.read(0, 4 * K16) == bytes(4 * K16)
        disk.write(2 * CLUSTER, pattern(K16))
        disk.write_zeroes(2 * CLUSTER + 3, 2, unmap=True)
        assert disk.read(2 * CLUSTER + 2, 2048) == (
            pattern(K16)[1024:1536] + bytes(1024) + pattern(K16)[2560:3072]
        )


def test_discard_reaches_the_base_and_allocates_nothing() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(6)
        disk = machine.disk(machine.volume(table))
        disk.discard(0, 6 * CLUSTER)
        assert table.allocated == 0
        assert base_ops(machine, "unmap") == 0
        disk.write(CLUSTER, pattern(2 * K16))
        disk.write(4 * CLUSTER, pattern(K16))
        disk.discard(CLUSTER + 1, 5 * CLUSTER - 1)
        assert base_ops(machine, "unmap") == 2  # clusters 1 and 2 lie side by side
        assert disk.read(0, 6 * K16) == (bytes(K16) + pattern(512) + bytes(5 * K16 - 512))
        assert table.allocated == 3


def test_a_read_only_volume_takes_no_writes() -> None:
    with LvolMachine() as machine:
        volume = machine.volume(machine.cluster_table(4), readonly=True)
        assert volume.io_types == {"read", "flush"}
        disk = machine.disk(volume)
        assert status_of_write(disk, 0, pattern(512)) == Status.IOERR
        data = segment_bytes(0, 8)
        assert disk.request(Kind.WRITE_ZEROES, data=data).status != Status.OK
        assert disk.read(0, 512) == bytes(512)
        disk.flush()


def test_a_table_shorter_than_the_volume_reads_as_zeroes_and_refuses_writes() -> None:
    """No index goes past a table, whatever size control gave the volume."""
    with LvolMachine() as machine:
        volume = machine.volume(machine.cluster_table(4))
        volume.set_table(machine.cluster_table(2))
        disk = machine.disk(volume)
        assert disk.read(3 * CLUSTER, 512) == bytes(512)
        assert status_of_write(disk, 3 * CLUSTER, pattern(512)) == Status.IOERR


def test_a_cluster_past_the_end_of_the_base_is_an_error() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(4)
        table.set(1, 0xFFFFFFFF)
        disk = machine.disk(machine.volume(table))
        assert disk.request(Kind.IN, CLUSTER, room=512).status == Status.IOERR
        assert status_of_write(disk, CLUSTER, pattern(512)) == Status.IOERR


def test_the_numbers_of_a_table() -> None:
    with LvolMachine() as machine:
        table = machine.cluster_table(1000)
        assert table.extent_pages is not None
        assert (len(table.extent_pages), table.allocated) == (2, 0)
        table.clusters[999] = 7
        table.recount()
        assert (table.get(999), table.allocated) == (7, 1)
        table.set(999, 0)
        table.set(3, 8)
        assert table.allocated == 1
        table.resize(1025)
        assert (len(table.extent_pages), table.get(3), table.get(1024)) == (3, 8, 0)
        table.resize(3)
        assert (table.num_clusters, table.allocated) == (3, 0)
        for index in (3, 1 << 40):
            with pytest.raises(IndexError):
                table.get(index)
            with pytest.raises(IndexError):
                table.set(index, 1)
