"""kill -9 of the target while requests are in flight, and the next one with the same front end.

The front end here keeps what QEMU keeps: guest memory, rings and the inflight region.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import front_end as vu
from tests.fakes.driver import F_RING_PACKED, BlkDriver, Kind, Pending, Session
from tests.fakes.process import TargetProcess

MIB = 1 << 20
SIZE = 64
SECTORS = 8


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


def configured(folder: Path, *, bdev: dict[str, Any], packed: bool) -> Path:
    controller = {"ctrlr": "disk", "dev_name": "B0", "packed_ring": packed}
    calls = [bdev, {"method": "vhost_create_blk_controller", "params": controller}]
    path = folder / "config.json"
    path.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": calls}]}))
    return path


def file_bdev(folder: Path) -> dict[str, Any]:
    image = folder / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    params = {"name": "B0", "filename": str(image), "block_size": 512}
    return {"method": "bdev_aio_create", "params": params}


def new_region(path: Path, packed: bool) -> vu.Inflight:
    with vu.FrontEnd(path) as front:
        front.set_protocol_features(front.get_protocol_features())
        features = 1 << 32 | 1 << vu.F_PROTOCOL_FEATURES | packed << F_RING_PACKED
        front.set_features(features)
        return front.get_inflight_fd(1, SIZE)


def come_back(session: Session, path: Path, region: vu.Inflight) -> None:
    """What a VM monitor says to the target that it finds again."""
    session.front_end.close()
    front = session.front_end = vu.FrontEnd(path)
    session._negotiate(())
    front.set_inflight_fd(region)
    front.set_mem_table(session.memory)
    session.start_queue_on(0, session.drivers[0].any_ring, session.ports[0])


def content(number: int) -> bytes:
    return number.to_bytes(2, "little") * (SECTORS * 256)


def write_many(driver: BlkDriver, first: int, count: int) -> list[Pending]:
    sent = [driver.queue(Kind.OUT, (first + i) * SECTORS, content(first + i)) for i in range(count)]
    driver.publish()
    return sent


@pytest.mark.parametrize("packed", [False, True])
def test_requests_in_flight_are_done_once_by_the_next_target(folder: Path, packed: bool) -> None:
    config = configured(folder, bdev=file_bdev(folder), packed=packed)
    target = TargetProcess(folder, "-c", str(config))
    region = new_region(folder / "disk", packed)
    written = 0
    with Session(folder / "disk", size=SIZE, region=region) as session:
        driver = session.drivers[0]
        try:
            for _ in range(4):
                sent = write_many(driver, written, 16)
                written += len(sent)
                target.kill()
                target = TargetProcess(folder, "-c", str(config))
                come_back(session, folder / "disk", region)
                driver.wait_all()
                assert [p.completion.status for p in sent if p.completion] == [0] * len(sent)
                assert not driver.collect()
            for number in range(written):
                assert driver.read(number * SECTORS, SECTORS * 512) == content(number)
            assert target.stop() == 0, target.log()
        finally:
            target.kill()
            os.close(region.fd)


def test_a_ram_disk_is_not_resumed_and_the_log_says_why(folder: Path) -> None:
    params = {"name": "B0", "num_blocks": 8192, "block_size": 512}
    params["uuid"] = "2f0e1c9e-0d5d-4c65-9e0c-0f8f3b7a1a11"  # the same again: not the same disk
    bdev = {"method": "bdev_malloc_create", "params": params}
    config = configured(folder, bdev=bdev, packed=False)
    target = TargetProcess(folder, "-c", str(config))
    region = new_region(folder / "disk", False)
    with Session(folder / "disk", size=SIZE, region=region) as session:
        try:
            session.drivers[0].write(0, content(1))
            target.kill()
            target = TargetProcess(folder, "-c", str(config))
            with pytest.raises((vu.HungUp, vu.Refused)):
                come_back(session, folder / "disk", region)
            line = target.wait_for_line("not resumed", 0)
            assert "bdev 'B0' is a RAM disk that is new and empty" in line
            assert "restart the guest" in line
            # The restarted guest asks for a new region, and is served.
            fresh = new_region(folder / "disk", False)
            with Session(folder / "disk", size=SIZE, region=fresh) as again:
                assert again.drivers[0].read(0, 512) == bytes(512)
            os.close(fresh.fd)
        finally:
            target.kill()
            os.close(region.fd)


def test_a_front_end_dies_and_a_new_one_connects(folder: Path) -> None:
    config = configured(folder, bdev=file_bdev(folder), packed=False)
    target = TargetProcess(folder, "-c", str(config))
    try:
        before = target.holds()
        for turn in range(3):
            region = new_region(folder / "disk", False)
            session = Session(folder / "disk", size=SIZE, region=region)
            write_many(session.drivers[0], turn * 16, 16)
            session.close()  # nobody waits for what is in flight
            os.close(region.fd)
            fresh = new_region(folder / "disk", False)
            with Session(folder / "disk", size=SIZE, region=fresh) as again:
                again.drivers[0].write(2048, content(turn))
                assert again.drivers[0].read(2048, SECTORS * 512) == content(turn)
            os.close(fresh.fd)
        target.expect_alive()
        assert before[0] <= target.open_files()
        assert target.stop() == 0, target.log()
    finally:
        target.kill()
