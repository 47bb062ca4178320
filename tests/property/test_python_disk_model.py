"""A disk in plain Python against a bytearray: any stream of requests, however it is framed."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.bdev.python_bdev import PythonBdev
from drivebay.bdev.python_disk import PythonDisk
from tests.fakes.driver import Framing, Kind, Status
from tests.fakes.stepped import Machine

DISK_BYTES = 64 << 10
SECTORS = DISK_BYTES // 512


class Step(NamedTuple):
    kind: Kind
    sector: int
    sectors: int
    fill: int
    cuts: tuple[int, ...]


steps = st.builds(
    Step,
    kind=st.sampled_from([Kind.IN, Kind.OUT]),
    sector=st.integers(0, SECTORS),
    sectors=st.integers(1, 16),
    fill=st.integers(0, 255),
    cuts=st.lists(st.integers(1, 700), max_size=6).map(tuple),
)


class Memory(PythonDisk):
    num_blocks = SECTORS
    threads = 2

    def __init__(self) -> None:
        self.content = bytearray(DISK_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= DISK_BYTES
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= DISK_BYTES
        self.content[offset : offset + len(data)] = data


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(st.lists(steps, min_size=1, max_size=12))
def test_any_stream_of_requests_answers_as_the_model(stream: list[Step]) -> None:
    model = bytearray(DISK_BYTES)
    disk = Memory()
    with Machine(PythonBdev("P0", None, disk)) as machine:
        driver = machine.add_queue()
        for step in stream:
            start, length = 512 * step.sector, 512 * step.sectors
            expected = Status.OK if start + length <= DISK_BYTES else Status.IOERR
            if step.kind == Kind.OUT:
                data = bytes((step.fill + i // 7) & 0xFF for i in range(length))
                framing = Framing(readable=(16, *step.cuts))
                pending = driver.queue(Kind.OUT, step.sector, data, framing=framing)
                if expected == Status.OK:
                    model[start : start + length] = data
            else:
                framing = Framing(writable=step.cuts)
                pending = driver.queue(Kind.IN, step.sector, room=length, framing=framing)
            driver.publish()
            answer = driver.wait(pending)
            assert answer.status == expected
            if step.kind == Kind.IN and expected == Status.OK:
                assert answer.data == model[start : start + length]
        assert disk.content == model
