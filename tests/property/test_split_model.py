"""Random requests to the parts of a split disk, against one bytearray that is the whole disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.split import SplitBdev
from drivebay.bdev.stack import part_uuid
from tests.fakes.driver import BlkDriver, Kind, Status, segment_bytes
from tests.fakes.stepped import Machine

BLOCKS = 100
PARTS = 3
PART = BLOCKS // PARTS  # one block is left over behind the last part


class Request(NamedTuple):
    """One, as hypothesis draws it."""

    part: int
    kind: Kind
    sector: int
    sectors: int
    fill: int


near_a_border = st.one_of(
    st.integers(0, 3), st.integers(PART - 4, PART + 3), st.integers(0, PART), st.just(1 << 54)
)
requests = st.builds(
    Request,
    part=st.integers(0, PARTS - 1),
    kind=st.sampled_from([Kind.IN, Kind.OUT, Kind.DISCARD, Kind.WRITE_ZEROES, Kind.FLUSH]),
    sector=near_a_border,
    sectors=st.one_of(st.integers(1, 5), st.just(PART), st.just(PART + 1)),
    fill=st.integers(1, 255),
)


class Scene:
    """A queue to each part, and one to the disk itself."""

    def __init__(self, stack: ExitStack, block_size: int) -> None:
        self.sectors = block_size // 512  # of a block
        base = MallocBdev("M0", None, block_size, BLOCKS)
        self.parts: list[BlkDriver] = []
        for i in range(PARTS):
            uuid = part_uuid(base, i * PART, PART)
            part = SplitBdev(f"M0p{i}", uuid, base, i * PART, PART)
            self.parts.append(stack.enter_context(Machine(part)).add_queue())
        self.whole = stack.enter_context(Machine(base)).add_queue()
        self.block_size = block_size

    def read_all(self) -> bytes:
        half = BLOCKS // 2
        first = self.whole.read(0, half * self.block_size)
        return first + self.whole.read(half * self.sectors, half * self.block_size)

    def check(self, model: bytearray, request: Request) -> None:
        """Make the request, and compare its answer; the model changes with it."""
        part, kind, sector, sectors, fill = request
        size = self.block_size
        first, length = sector * self.sectors, sectors * self.sectors
        fits = sector + sectors <= PART or kind == Kind.FLUSH
        start = (part * PART + sector) * size
        pattern = bytes((fill + i) & 0xFF for i in range(251))
        payload = (pattern * (sectors * size // 251 + 1))[: sectors * size]
        data = b""
        if kind == Kind.OUT:
            data = payload
        elif kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            data = segment_bytes(first, length)
        room = sectors * size if kind == Kind.IN else 0
        done = self.parts[part].request(kind, first, data, room)
        assert done.status == (Status.OK if fits else Status.IOERR)
        if fits and kind == Kind.IN:
            assert done.data == model[start : start + room]
        elif fits and kind != Kind.FLUSH:
            model[start : start + sectors * size] = (
                payload if kind == Kind.OUT else bytes(sectors * size)
            )


@pytest.fixture(params=[512, 4096], scope="module")
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack, request.param)


@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(made=st.lists(requests, min_size=1, max_size=25))
def test_the_parts_are_the_disk_and_nothing_else(scene: Scene, made: list[Request]) -> None:
    for half in range(2):
        scene.whole.write_zeroes(half * BLOCKS // 2 * scene.sectors, BLOCKS // 2 * scene.sectors)
    model = bytearray(BLOCKS * scene.block_size)
    for request in made:
        scene.check(model, request)
    assert scene.read_all() == model
