"""Extent pages that a power cut tears while the owner writes them in place.

Each block of a page may be of any version since the last flush (since the last write that was
answered, where the base has no cache). What was stable is never lost, nothing is ever made up.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.bdev.base import Bdev
from drivebay.bdev.file import FileBdev
from drivebay.bdev.lvol.blob import read_extent_page
from drivebay.bdev.lvol.extent_page import draw, is_sealed, mend
from drivebay.bdev.lvol.layout import is_sound, unpack_page
from drivebay.bdev.lvol.table import ClusterTable
from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.lvol import PAGE_BYTES, PAGES_OFFSET, LvolMachine
from tests.fakes.stepped import malloc_bdev

CLUSTER_BYTES = 4096
ENTRIES = 512
# Entries are not aligned to blocks: only numbers from here on have a byte in both.
HIGH_CLUSTER = (1 << 24) - 40
HIGH_BYTES = (HIGH_CLUSTER + ENTRIES + 100) * CLUSTER_BYTES
TEARINGS = 12

indexes = st.one_of(st.integers(0, ENTRIES - 1), st.sampled_from([121, 249, 377, 505]))
steps = st.one_of(
    st.just("flush"), st.just("control"), st.lists(indexes, min_size=1, max_size=16)
)  # fmt: skip


def torn(versions: list[bytes], chosen: random.Random) -> bytes:
    return b"".join(
        chosen.choice(versions)[start : start + 512] for start in range(0, PAGE_BYTES, 512)
    )


def entries_of(image: bytes) -> list[int]:
    page = unpack_page(image)
    assert page is not None
    start, entries = read_extent_page(page, 1)
    assert (start, len(entries)) == (0, ENTRIES)
    return list(entries)


def check_torn(versions: list[bytes], chosen: random.Random) -> None:
    """The first version is stable."""
    stable, latest = entries_of(versions[0]), entries_of(versions[-1])
    for _ in range(TEARINGS):
        image = torn(versions, chosen)
        found: bytes | None = image if is_sound(image) else mend(image)
        assert found is not None
        for entry, old, new in zip(entries_of(found), stable, latest, strict=True):
            assert entry == old if old else entry in (0, new)
        for _ in range(2):  # and torn again while that is written
            again = torn([image, found], chosen)
            assert is_sound(again) or mend(again) is not None
            assert entries_of(again if is_sound(again) else mend(again) or b"") == entries_of(found)


class Scene:
    def __init__(self, machine: LvolMachine, high: bool) -> None:
        self.machine = machine
        self.table = machine.cluster_table(ENTRIES)
        volume = machine.volume(self.table)
        self.cached = volume.write_cache
        self.disk: BlkDriver = machine.disk(volume)
        self.raw: BlkDriver = machine.disk(machine.bdev)
        if high:
            machine.settle(machine.space.freeze())
            machine.space.free.used[: HIGH_CLUSTER // 8] = b"\xff" * (HIGH_CLUSTER // 8)
            machine.space.free.recount()
            machine.settle(machine.space.thaw())
        self.write([0])
        self.disk.flush()
        self.versions = [self.image()]

    def image(self) -> bytes:
        assert self.table.extent_pages is not None
        place = PAGES_OFFSET + self.table.extent_pages[0] * PAGE_BYTES
        return self.raw.read(place // 512, PAGE_BYTES)

    def write(self, places: list[int]) -> None:
        for index in places:
            self.disk.queue(Kind.OUT, index * CLUSTER_BYTES // 512, bytes(512))
        self.disk.publish()
        self.disk.wait_all()

    def step(self, step: str | list[int], chosen: random.Random) -> None:
        if step == "flush":
            self.disk.flush()
            self.versions = [self.image()]
        elif step == "control":  # something else was changed, which flushes
            self.raw.flush()
            self.machine.settle(self.machine.space.freeze())
            self.machine.settle(self.machine.space.thaw(flushed=True))
            self.versions = [self.image()]
        else:
            assert isinstance(step, list)
            self.write(step)
            self.versions.append(self.image())
        check_torn(self.versions, chosen)
        if not self.cached:
            self.versions = [self.image()]


@settings(max_examples=40, deadline=None, database=None)
@given(st.sampled_from(["malloc", "file", "high"]), st.lists(steps, max_size=12), st.integers())
def test_a_torn_page_keeps_what_was_stable(
    kind: str, plan: list[str | list[int]], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base: Bdev = malloc_bdev(size_bytes=4 << 20)
        if kind != "malloc":
            path = Path(folder, "disk")
            with path.open("wb") as file:
                file.truncate(HIGH_BYTES if kind == "high" else 4 << 20)
            base = FileBdev("F", None, str(path), 512, module="uring")
        with LvolMachine(base=base, cluster_bytes=CLUSTER_BYTES) as machine:
            scene = Scene(machine, kind == "high")
            chosen = random.Random(seed)
            for step in plan:
                scene.step(step, chosen)


def test_what_a_torn_write_does_not_explain_is_not_mended() -> None:
    table = ClusterTable(ENTRIES, 1 << 32)
    for index in range(0, ENTRIES, 3):
        table.set(index, index + 100)
    old, new = draw(table, 0, ENTRIES), draw(table, 0, ENTRIES, {1: 7, 400: 8})
    assert is_sealed(old)
    assert is_sound(old)
    assert entries_of(new)[:4] == [100, 7, 0, 103]
    mixed = old[:2048] + new[2048:]
    assert entries_of(mend(mixed) or b"") == entries_of(old)
    assert entries_of(mend(new[:3584] + old[3584:]) or b"") == entries_of(old)
    for place in (17, 22, 26, 25 + 4 * 300, 3590, 3595, 3610, 3670, 3729):
        damaged = bytearray(mixed)
        damaged[place] ^= 0x10
        assert mend(damaged) is None, place
    assert mend(old[:2500] + b"x" + old[2501:]) == old  # nothing is there
    foreign = ClusterTable(ENTRIES, 2 << 32)  # whose page it was before
    foreign.clusters[:] = table.clusters
    assert mend(new[:512] + draw(foreign, 0, ENTRIES)[512:]) == draw(foreign, 0, ENTRIES)
    assert mend(bytes(PAGE_BYTES)) is None
    assert mend(old[:100]) is None
    unsealed = bytearray(old)
    unsealed[3584:3592] = bytes(8)
    assert not is_sealed(unsealed)
    assert mend(unsealed) is None
    with pytest.raises(IndexError):
        draw(table, 1, ENTRIES)
    with pytest.raises(IndexError):
        draw(table, 0, 100, {100: 1})
