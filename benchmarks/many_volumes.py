"""A store with thousands of idle volumes: how long it takes to open, list and close, how long
another client waits meanwhile, and what memory a volume costs.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from targets import Target

from drivebay.bdev.lvol import creation, volumes
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.errors import DrivebayError
from drivebay.rpc.client import Client

STORE_BYTES = 4 << 30  # most of it a hole
BLOCK_BYTES = 4096
PAGES_PERCENT = 1000  # metadata pages for each cluster: 10,240
ASKED_EVERY_S = 0.005

# In seconds, by what the figures' names begin with.
LIMITS_S = {"open": 2.0, "close": 2.0, "another client": 0.05}


class FileDevice:
    """A file that nothing is flushed to: whoever makes a store in it does not wait for the disk."""

    block_size = BLOCK_BYTES
    size = STORE_BYTES

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    async def write(self, offset: int, data: Any) -> None:
        os.pwrite(self._descriptor, data, offset)

    async def flush(self) -> None:
        """Nothing."""

    async def unmap(self, offset: int, length: int) -> None:
        """Nothing: it is a hole."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """The same."""


def make_table(num_clusters: int, blob_id: int, extent_table: bool) -> ClusterTable:
    return ClusterTable(num_clusters, blob_id, extent_table=extent_table)


async def write_store(file: Path, count: int) -> None:
    """A store 'many' with the thin volumes v0, v1 …, closed properly."""
    with file.open("w+b", buffering=0) as made:
        made.truncate(STORE_BYTES)
        device = FileDevice(made.fileno())
        sb = creation.plan(STORE_BYTES, BLOCK_BYTES, pages_percent=PAGES_PERCENT)
        metadata = await creation.create_store(device, make_table, "many", uuid4(), sb)
        for number in range(count):
            size = sb.cluster_bytes
            await volumes.create(metadata, f"v{number}", uuid4(), size, thin=True)
        await metadata.close()


@contextmanager
def asking(target: Target) -> Iterator[list[float]]:
    """Another client asks something all the time; the list is how long it waits."""
    waits = [0.0]
    ended = threading.Event()

    def ask() -> None:
        with Client(str(target.rpc)) as client:
            while not ended.wait(ASKED_EVERY_S):
                began = time.monotonic()
                client.call("notify_get_types")
                waits.append(time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        ended.set()
        thread.join()


def measure(target: Target, folder: Path, count: int, repeat: int) -> dict[str, list[float]]:
    """Figures by name, those in seconds with ", s" at the end.

    The store is open when its last volume is there, which can be used then; what lies on the
    volumes is looked into afterwards.
    """
    file = folder / "store"
    asyncio.run(write_store(file, count))
    disk = {"name": "many", "filename": str(file), "block_size": BLOCK_BYTES}
    found: dict[str, list[float]] = {}

    def note(name: str, figure: float) -> None:
        found.setdefault(name, []).append(figure)

    for _ in range(repeat):
        before = target.resident_bytes()
        with asking(target) as waits:
            began = time.monotonic()
            target.call("bdev_aio_create", **disk)
            target.call("bdev_get_bdevs", name=f"many/v{count - 1}", timeout=60_000)
            note(f"open with {count} volumes, s", time.monotonic() - began)
            target.call("bdev_wait_for_examine")
        note("another client meanwhile waits at most, s", max(waits))
        if "memory of a volume, bytes" not in found:  # later ones have what the first gave back
            note("memory of a volume, bytes", (target.resident_bytes() - before) / count)
        began = time.monotonic()
        listed = len(target.call("bdev_get_bdevs"))
        note("list them all, s", time.monotonic() - began)
        if listed <= count:
            raise DrivebayError(f"the store came back with {listed - 1} of {count} volumes")
        began = time.monotonic()
        target.call("bdev_aio_delete", name="many")
        note(f"close with {count} volumes, s", time.monotonic() - began)
    return found
