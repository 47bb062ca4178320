"""Logical volumes of a real target: written through vhost-user, killed, restarted, grown, full."""

from __future__ import annotations

import hashlib
import json
import lzma
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Kind, Session, Status
from tests.fakes.process import RpcError, TargetProcess, wait_until

MIB = 1 << 20
IMAGES = Path(__file__).parents[1] / "data" / "lvol"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


def image(folder: Path, mebibytes: int) -> Path:
    path = folder / "store.img"
    with path.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return path


def with_disk(target: TargetProcess, path: Path) -> None:
    target.rpc("bdev_aio_create", name="A", filename=str(path), block_size=4096)
    target.rpc("bdev_wait_for_examine")


def with_store(folder: Path, mebibytes: int = 64) -> TargetProcess:
    target = TargetProcess(folder)
    with_disk(target, image(folder, mebibytes))
    target.rpc("bdev_lvol_create_lvstore", bdev_name="A", lvs_name="s", cluster_sz=MIB)
    return target


def volumes(target: TargetProcess) -> dict[str, Any]:
    return {volume["name"]: volume for volume in target.rpc("bdev_lvol_get_lvols")}


def pattern(length: int, seed: int) -> bytes:
    return (bytes((seed + i) % 251 + 1 for i in range(4096)) * (length // 4096 + 1))[:length]


def read_all(disk: Any, length: int) -> bytes:
    return b"".join(disk.read(at // 512, 65536) for at in range(0, length, 65536))


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_was_written_is_there_after_a_restart(folder: Path, end: str) -> None:
    target = with_store(folder)
    target.rpc("bdev_lvol_create", lvs_name="s", lvol_name="v", size_in_mib=16, thin_provision=True)
    with Session(target.controller("disk", "s/v")) as session:
        session.disk.write(5 * MIB // 512 - 8, pattern(8192, 1))
        session.disk.write(0, pattern(4096, 2))
        session.disk.flush()
        target.rpc("bdev_lvol_snapshot", lvol_name="s/v", snapshot_name="old")
        session.disk.write(5 * MIB // 512, pattern(4096, 3))
        session.disk.flush()
    target.rpc("bdev_lvol_clone", snapshot_name="s/old", clone_name="c")
    before = volumes(target)
    if end == "stop":
        target.rpc("vhost_delete_controller", ctrlr="disk")
        assert target.stop() == 0
    else:
        target.kill()
    target = TargetProcess(folder)
    with_disk(target, folder / "store.img")
    assert volumes(target) == before
    with Session(target.controller("disk", "s/v")) as session:
        session.disk.write(9 * MIB // 512, pattern(4096, 4))
        assert session.disk.read(5 * MIB // 512 - 8, 8192) == pattern(4096, 1) + pattern(4096, 3)
        assert session.disk.read(0, 8192) == pattern(4096, 2) + bytes(4096)
    with Session(target.controller("clone", "s/c")) as session:
        assert session.disk.read(5 * MIB // 512 - 8, 8192) == pattern(8192, 1)
        assert session.disk.read(9 * MIB // 512, 4096) == bytes(4096)
    assert target.stop() == 0


@pytest.mark.parametrize("name", ["spdk-lvs-clean", "spdk-lvs-crashed"])
def test_a_store_that_spdk_wrote_opens_with_its_content(folder: Path, name: str) -> None:
    path = folder / "store.img"
    path.write_bytes(lzma.decompress((IMAGES / f"{name}.img.xz").read_bytes()))
    said = json.loads((IMAGES / f"{name}.json").read_text())
    block_size = said["store"]["block_size"]
    target = TargetProcess(folder)
    target.rpc("bdev_aio_create", name="AL", filename=str(path), block_size=block_size)
    target.rpc("bdev_wait_for_examine")
    assert volumes(target) == {volume["name"]: volume for volume in said["lvols"]}
    for number, (volume, content) in enumerate(said["content"].items()):
        socket = target.controller(f"disk{number}", f"lvs0/{volume}")
        with Session(socket) as session:
            found = read_all(session.disk, content["bytes"])
        assert hashlib.sha256(found).hexdigest() == content["sha256"]
    assert target.stop() == 0


def test_a_full_store_fails_writes_says_so_and_goes_on(folder: Path) -> None:
    target = with_store(folder, 16)
    target.rpc("bdev_lvol_create", lvs_name="s", lvol_name="v", size_in_mib=64, thin_provision=True)
    [store] = target.rpc("bdev_lvol_get_lvstores")
    mark = target.mark()
    with Session(target.controller("disk", "s/v")) as session:
        for cluster in range(store["free_clusters"]):
            session.disk.write(cluster * MIB // 512, pattern(4096, cluster))
        for cluster in (40, 41):
            done = session.disk.request(Kind.OUT, cluster * MIB // 512, pattern(4096, 1))
            assert done.status == Status.IOERR
        target.wait_for_line("'s' is full", mark)
        [bdev] = target.rpc("bdev_get_bdevs", name="s/v")
        assert bdev["driver_specific"]["lvol"]["lvol_store_full"] is True
        session.disk.write(0, pattern(4096, 99))
        assert session.disk.read(0, 4096) == pattern(4096, 99)
        assert session.disk.read(MIB // 512, 4096) == pattern(4096, 1)
    assert target.log()[mark:].count("is full") == 1
    assert target.stop() == 0


def test_growth_reaches_the_guest_and_shrinking_asks_for_force(folder: Path) -> None:
    target = with_store(folder)
    target.rpc("bdev_lvol_create", lvs_name="s", lvol_name="v", size_in_mib=8)
    with Session(target.controller("disk", "s/v")) as session:
        assert session.capacity() == 8 * MIB // 512
        session.disk.write(7 * MIB // 512, pattern(4096, 1))
        target.rpc("bdev_lvol_resize", name="s/v", size_in_mib=12)
        assert session.capacity() == 12 * MIB // 512
        session.disk.write(11 * MIB // 512, pattern(4096, 2))
        with pytest.raises(RpcError) as refused:
            target.rpc("bdev_lvol_resize", name="s/v", size_in_mib=4)
        assert refused.value.code == -16
        assert session.disk.read(11 * MIB // 512, 4096) == pattern(4096, 2)
        target.rpc("bdev_lvol_resize", name="s/v", size_in_mib=4, force=True)
        assert session.capacity() == 4 * MIB // 512
        done = session.disk.request(Kind.IN, 7 * MIB // 512, room=4096)
        assert done.status == Status.IOERR
        assert volumes(target)["v"]["num_allocated_clusters"] == 4
    assert target.stop() == 0


def test_a_shallow_copy_has_what_a_snapshot_itself_has(folder: Path) -> None:
    target = with_store(folder)
    target.rpc("bdev_lvol_create", lvs_name="s", lvol_name="v", size_in_mib=8, thin_provision=True)
    target.malloc("M", 8, block_size=512)
    with Session(target.controller("disk", "s/v")) as session:
        session.disk.write(MIB // 512, pattern(65536, 1))
        target.rpc("bdev_lvol_snapshot", lvol_name="s/v", snapshot_name="one")
        session.disk.write(3 * MIB // 512, pattern(65536, 2))
        target.rpc("bdev_lvol_snapshot", lvol_name="s/v", snapshot_name="two")
    started = target.rpc("bdev_lvol_start_shallow_copy", src_lvol_name="s/two", dst_bdev_name="M")
    number = started["operation_id"]
    shown: dict[str, Any] = {}

    def ended() -> bool:
        shown.update(target.rpc("bdev_lvol_check_shallow_copy", operation_id=number))
        return bool(shown["state"] != "in progress")

    wait_until(ended, "the end of the copy")
    assert shown == {"copied_clusters": 1, "total_clusters": 1, "state": "complete"}
    with pytest.raises(RpcError) as gone:
        target.rpc("bdev_lvol_check_shallow_copy", operation_id=number)
    assert gone.value.code == -19
    with Session(target.controller("copy", "M")) as session:
        assert session.disk.read(3 * MIB // 512, 65536) == pattern(65536, 2)
        assert session.disk.read(MIB // 512, 65536) == bytes(65536)
    for source, into, code in (("s/v", "M", -32602), ("s/two", "A", -32602), ("M", "M", -19)):
        with pytest.raises(RpcError) as refused:
            target.rpc("bdev_lvol_start_shallow_copy", src_lvol_name=source, dst_bdev_name=into)
        assert refused.value.code == code
    assert target.stop() == 0
