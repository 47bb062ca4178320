"""As many queues and as long rings as we say that we can serve, all at once."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.driver import Kind, Session, Status
from tests.fakes.memory import MIB, Layout
from tests.fakes.process import TargetProcess

QUEUES = 256
ENTRIES = 1024
DISK_MIB = 8
SECTORS = DISK_MIB * 2048
FILLED = 4  # queues whose rings are filled to the last entry
DESCRIPTORS = 3  # of one request


@pytest.fixture
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name), "-m", "0x3")
        process.malloc("M0", DISK_MIB)
        yield process
        assert process.stop() == 0


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_256_queues_of_1024_entries(target: TargetProcess, packed: bool) -> None:
    path = target.controller("vhost.0", "M0", packed_ring=packed)
    layouts = [Layout(0, 64 * MIB)]
    with Session(path, queues=QUEUES, size=ENTRIES, layouts=layouts, timeout=60) as session:
        assert session.front_end.get_queue_num() == QUEUES
        for number, disk in enumerate(session.drivers):
            disk.write(number, number.to_bytes(2, "little") * 256)
        for number, disk in enumerate(reversed(session.drivers)):
            assert disk.read(number, 512) == number.to_bytes(2, "little") * 256
        for disk in random.Random(1).sample(session.drivers, FILLED):
            whole = [
                disk.queue(Kind.IN, sector, room=512)
                for sector in range(SECTORS - ENTRIES // DESCRIPTORS, SECTORS)
            ]
            disk.publish()
            disk.wait_all()
            for pending in whole:
                assert pending.completion is not None
                assert pending.completion.status == Status.OK
