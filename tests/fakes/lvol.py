"""A store in memory without its metadata: a malloc bdev, a space, and tables made by hand.

Two stepped reactors; the first one owns the space. Context: tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from drivebay.bdev.base import Bdev, Channel
from drivebay.bdev.lvol.extent_page import draw
from drivebay.bdev.lvol.path import LvolBdev
from drivebay.bdev.lvol.space import Space
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.memory.crc32c import crc32c
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import BlkDriver
from tests.fakes.stepped import Machine, malloc_bdev

PAGES_OFFSET = 4096
PAGE_BYTES = 4096
RESERVED_BYTES = 64 << 10  # a super block and 15 metadata pages would lie there


class LvolMachine(Machine):
    """A store's data half. on_need is served in step(), as control would."""

    def __init__(
        self,
        *,
        cluster_bytes: int = 16 << 10,
        size_bytes: int = 1 << 20,
        zeroed: bool = True,
        base: Bdev | None = None,
    ) -> None:
        self.second: Reactor | None = None
        self.needs = 0
        self.fulls = 0
        self.serving = True
        self.mending = True
        self._busy = False
        self._pages = 0
        self._counts = 0
        super().__init__(base or malloc_bdev(size_bytes=size_bytes))
        self.base_channel = self.channel
        self.second = Reactor(0, self.control, 50)
        total = self.bdev.num_blocks * self.bdev.block_size // cluster_bytes
        self.space = Space(
            self.base_channel,
            total,
            cluster_bytes,
            PAGES_OFFSET,
            PAGE_BYTES,
            on_need=self._note_need,
            on_full=self._note_full,
        )
        for cluster in range(-(-RESERVED_BYTES // cluster_bytes)):
            self.space.free.used[cluster // 8] |= 1 << cluster % 8
        self.space.free.recount()
        if zeroed:
            self.space.free.mark_zeroed(0, total)
        self.settle(self.space.thaw())

    def _note_need(self) -> None:
        self.needs += 1

    def _note_full(self) -> None:
        self.fulls += 1

    def step(self, turns: int = 1) -> int:
        done = 0
        for _ in range(turns):
            done += super().step()
            if self.second is not None:
                done += self.second.step(self.now)
                self.control.drain()
            if self.needs and self.serving and not self._busy:
                self._busy = True
                self.settle(self.space.freeze())
                self.needs = 0
                self.serve()
                self.settle(self.space.thaw())
                self._busy = False
        return done

    def serve(self) -> None:
        """What control does about failed_pages() and wants()."""
        if self.space.failed_pages():
            if not self.mending:
                return
            for table, page in self.space.failed_pages():
                assert table.extent_pages is not None
                place = PAGES_OFFSET + table.extent_pages[page] * PAGE_BYTES
                image = draw(table, page, table.num_clusters)
                self.disk(self.bdev).write(place // 512, image)
            self.space.forget_failed()
        for table, index, cluster in self.space.wants():
            if cluster:
                table.set(index, cluster)
            elif table.extent_pages is not None and not table.extent_pages[index // 512]:
                self._pages += 1
                table.extent_pages[index // 512] = self._pages

    def cluster_table(self, clusters: int, *, extent_table: bool = True) -> ClusterTable:
        self._counts += 1
        return ClusterTable(clusters, self._counts << 32, extent_table=extent_table)

    def volume(
        self, table: ClusterTable, external: Bdev | None = None, *, readonly: bool = False
    ) -> LvolBdev:
        self._counts += 1
        name = f"L{self._counts}"
        return LvolBdev(name, None, self.space, table, external, readonly=readonly)

    def open_on(self, reactor: Reactor, bdev: Bdev) -> Channel:
        bases = [None if base is None else self.open_on(reactor, base) for base in bdev.bases]
        channel = bdev.open_channel(reactor, *bases)
        self.settle(channel.activate())
        self._dead_channels.append(channel)
        return channel

    def disk(self, volume: Bdev, *, second: bool = False, size: int = 256) -> BlkDriver:
        """A queue on a channel of a volume, on the owner's reactor or the other one."""
        assert self.second is not None
        self.channel = self.open_on(self.second if second else self.reactor, volume)
        driver = self.add_queue(size)
        self.channel = self.base_channel
        return driver

    def pages_on_disk(self) -> dict[tuple[int, int], list[int]]:
        """The extent pages by (blob id, first index): what a restart would find."""
        disk = self.disk(self.bdev)
        found = {}
        for page in range(1, self._pages + 1):
            image = disk.read((PAGES_OFFSET + page * PAGE_BYTES) // 512, PAGE_BYTES)
            (crc,) = struct.unpack_from("<I", image, 4092)
            if image == bytes(PAGE_BYTES):
                continue
            assert crc == crc32c(image[:4092])
            blob, sequence, reserved, kind, length, start = struct.unpack_from("<QIIBII", image)
            assert (sequence, reserved, kind) == (0, 0, 6)
            assert image[4088:4092] == b"\xff" * 4
            count = (length - 4) // 4
            found[blob, start] = list(struct.unpack_from(f"<{count}I", image, 25))
        return found

    def check_disk(self, *tables: ClusterTable) -> None:
        """Each allocation is on disk, no cluster has two places, and every used one has one."""
        pages = self.pages_on_disk()
        owned = [cluster for table in tables for cluster in table.clusters if cluster]
        assert len(owned) == len(set(owned))
        for table in tables:
            for start, entries in spans(table):
                if any(entries):
                    assert pages[table.blob_id, start] == entries
            assert table.allocated == sum(1 for cluster in table.clusters if cluster)
        free = self.space.free
        reserved = -(-RESERVED_BYTES // self.space.cluster_bytes)
        used = {cluster for cluster in range(reserved, free.total) if free.is_used(cluster)}
        assert used == set(owned)
        assert free.free == free.total - reserved - len(owned)

    def end_reactor(self) -> None:
        self.settle(self.space.freeze())
        self.settle(self.space.close())
        assert self.second is not None
        self.second.close()


def spans(table: ClusterTable) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, table.num_clusters, 512):
        yield start, list(table.clusters[start : start + 512])
