"""A guest writes onto its own disk what the target would take for partitions of its own."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from drivebay.wire.gpt import (
    SPDK_TYPE,
    Entry,
    add_entry,
    new_table,
    pack_protective_mbr,
    table_writes,
)
from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess

MIB = 1 << 20
SECTORS = 8 * MIB // 512


def trap() -> list[tuple[int, bytes]]:
    """Where to write what, so that the disk holds a partition of ours with somebody's uuid."""
    entry = Entry(1, SPDK_TYPE, UUID(int=7), 2048, 4095, 0, "trap")
    table = add_entry(new_table(SECTORS, 512, UUID(int=8)), entry)
    pieces = [(0, pack_protective_mbr(SECTORS, 512))]
    for group in table_writes(table, 512):
        pieces += group
    return pieces


def test_the_disk_of_a_guest_is_not_taken_for_ours_at_the_next_start(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    config = tmp_path / "vhost.json"
    target = TargetProcess(tmp_path, "-c", str(config), "--autosave")
    try:
        target.rpc("bdev_aio_create", name="A0", filename=str(image), block_size=512)
        with Session(target.controller("guest", "A0")) as session:
            for offset, data in trap():
                session.disk.write(offset // 512, data)
        assert target.stop() == 0
        target = TargetProcess(tmp_path, "-c", str(config), "--autosave")
        target.rpc("bdev_wait_for_examine")
        assert [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")] == ["A0"]
        assert [found["ctrlr"] for found in target.rpc("vhost_get_controllers")] == ["guest"]
        target.rpc("vhost_delete_controller", ctrlr="guest")
        target.rpc("bdev_aio_delete", name="A0")
        # What nobody uses when it comes is looked into, as SPDK does.
        target.rpc("bdev_aio_create", name="A1", filename=str(image), block_size=512)
        target.rpc("bdev_wait_for_examine")
        assert [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")] == ["A1", "A1p1"]
        assert target.stop() == 0
    finally:
        target.kill()
