"""`drivebay pool` and `drivebay disk` with a real target: data, refusals, and restarts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.bay import MIB, SECTORS, Bay, pattern
from tests.fakes.driver import Session
from tests.fakes.process import wait_until


def test_the_life_of_a_disk_in_a_pool(bay: Bay) -> None:
    bay.ok("disk", "create", "web", "--size", "1G")
    file = bay.folder / "data" / "drivebay" / "pools" / "default.img"
    # The store's own pages take a thousandth of it.
    assert file.stat().st_blocks * 512 < file.stat().st_size / 500
    bay.write("default/web", 0, pattern(1))
    bay.ok("disk", "snapshot", "web", "one")
    bay.write("default/web", 0, pattern(2))
    bay.write("default/web", 100 * SECTORS, pattern(2))
    bay.ok("disk", "resize", "web", "--size", "2G")
    bay.ok("disk", "snapshot", "web", "two")
    bay.write("default/web", 0, pattern(3))
    bay.ok("disk", "clone", "web@one", "old")
    bay.ok("disk", "clone", "web", "full", "--full")
    uuid = bay.info("web")["bdev"]
    for crash in (False, True):
        bay.restart(crash=crash)
        assert set(bay.ok("disk", "list", "-q").split()) == {"web", "old", "full"}
        assert bay.read("default/web", 0, 4096) == pattern(3)
        assert bay.read("default/old", 0, 4096) == pattern(1)
        assert bay.read("default/old", 100 * SECTORS, 4096) == bytes(4096)
        assert bay.read("default/full", 100 * SECTORS, 4096) == pattern(2)
        assert bay.read("default/full", 0, 4096) == pattern(3)
    assert bay.info("full")["parent"] is None
    assert bay.info("web")["snapshots"] == ["one", "two"]

    with Session(bay.attach("default/web")) as session:
        assert "machines that are connected" in bay.refused("disk", "revert", "web", "one", "--yes")
        assert session.disk.read(0, 4096) == pattern(3)
    wait_until(lambda: bay.info("web")["controllers"][0]["sessions"] == 0, "no session")
    # Back by two snapshots, forth by one; the controller and the uuid stay.
    bay.ok("disk", "revert", "web", "one", "--yes")
    assert (bay.info("web")["size"], bay.info("web")["bdev"]) == (1024 * MIB, uuid)
    with Session(bay.folder / "vhost.web") as session:
        assert session.capacity() == 1024 * SECTORS
        assert session.disk.read(0, 4096) == pattern(1)
        assert session.disk.read(100 * SECTORS, 4096) == bytes(4096)
        session.disk.write(50 * SECTORS, pattern(4))
    bay.detach("default/web")
    bay.ok("disk", "revert", "web", "two", "--yes")
    assert bay.read("default/web", 0, 4096) == pattern(2)
    assert bay.read("default/web", 50 * SECTORS, 4096) == bytes(4096)
    assert bay.read("default/web", 100 * SECTORS, 4096) == pattern(2)
    bay.restart(crash=True)
    assert bay.read("default/web", 0, 4096) == pattern(2)
    assert bay.info("web")["size"] == 2048 * MIB

    assert "has clones, which read from its snapshots: old" in bay.refused(
        "disk", "delete", "web", "--yes", "--with-snapshots"
    )
    bay.ok("disk", "delete", "old", "--yes")
    assert "has snapshots: one, two" in bay.refused("disk", "delete", "web", "--yes")
    bay.ok("disk", "delete", "web@one")
    assert bay.read("default/web", 0, 4096) == pattern(2)
    bay.ok("disk", "delete", "web", "--yes", "--with-snapshots")
    assert bay.ok("disk", "list", "-q") == "full\n"
    assert "pool 'default' holds 1 disk: full" in bay.refused("pool", "delete", "default", "--yes")
    bay.ok("pool", "delete", "default", "--yes", "--with-disks")
    assert not file.exists()
    assert bay.target.rpc("bdev_get_bdevs") == []
    bay.restart()
    assert bay.ok("pool", "list", "-q") == ""


def test_a_pool_grows_and_tells_what_it_promised(bay: Bay) -> None:
    file = bay.folder / "p.img"
    bay.ok("pool", "create", "p", "--file", str(file), "--size", "256M")
    bay.ok("disk", "create", "web", "--size", "1G")
    assert "of pool 'p' is promised" in bay.run("pool", "list").err
    thick = bay.run("disk", "create", "db", "--size", "512M", "--thick")
    assert (thick.code, "too little for a thick disk" in thick.err) == (1, True)
    bay.ok("pool", "grow", "p", "--size", "4G")
    bay.ok("disk", "create", "db", "--size", "512M", "--thick")
    (pool,) = json.loads(bay.ok("pool", "list", "--json"))
    assert pool["promised"] == 1536 * MIB
    assert pool["used"] >= 512 * MIB
    assert pool["warning"] is None
    bay.restart(crash=True)
    (again,) = json.loads(bay.ok("pool", "list", "--json"))
    assert (again["size"], again["used"]) == (pool["size"], pool["used"])
    before = set(bay.folder.iterdir())
    bay.refused("pool", "create", "p", "--file", str(bay.folder / "q"), "--size", "1G")
    assert set(bay.folder.iterdir()) == before


def test_limits_are_set_shown_and_kept(bay: Bay) -> None:
    bay.ok("disk", "create", "d", "--file", str(bay.folder / "d"), "--size", "8M")
    bay.ok("disk", "limit", "d", "--iops", "20000", "--read-mbps", "100")
    assert "20000 IOPS, 100 MiB/s read" in bay.ok("disk", "list")
    bay.restart()
    assert bay.info("d")["limits"] == {"rw_ios_per_sec": 20000, "r_mbytes_per_sec": 100}
    bay.ok("disk", "limit", "d", "--iops", "0", "--read-mbps", "0")
    assert bay.info("d")["limits"] == {}


# ---- a pool on a partition ---------------------------------------------------------------------


@pytest.fixture
def loop(bay: Bay) -> Iterator[Path]:
    """A loop device of 512 MiB whose partitions the kernel shows."""
    if os.geteuid() != 0:
        pytest.skip("only root may make devices")
    backing = bay.folder / "backing"
    with backing.open("wb") as file:
        file.truncate(512 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", "--partscan", str(backing)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    device = Path(made.stdout.strip())
    yield device
    bay.end()
    subprocess.run(["losetup", "--detach", str(device)], check=True)


@pytest.mark.needs_root
def test_a_pool_on_a_partition_beside_a_mounted_one(bay: Bay, loop: Path) -> None:
    bay.ok("pool", "create", "first", "--device", str(loop), "--size", "100M", "--yes")
    bay.ok("pool", "delete", "first", "--yes")
    # The partition stays, is empty, and the host puts its own file system on it.
    part = Path(f"{loop}p1")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "host", part], check=True)
    mount = bay.folder / "mnt"
    mount.mkdir()
    subprocess.run(["mount", part, mount], check=True)
    try:
        (mount / "file").write_text("the host's own")
        shown = bay.ok("pool", "create", "p", "--device", str(loop), "--dry-run")
        assert "partition 1 'first': ext4 \"host\", 100 MiB" in shown
        assert f"{loop.name}p1 is mounted on {mount}" in shown
        assert "would make partition 2" in shown
        bay.ok("pool", "create", "p", "--device", str(loop), "--yes")
        bay.ok("disk", "create", "web", "--size", "200M")
        bay.write("p/web", 0, pattern(1))
        bay.restart(crash=True)
        assert bay.read("p/web", 0, 4096) == pattern(1)
        assert (mount / "file").read_text() == "the host's own"
        assert "has no room" in bay.refused("pool", "create", "q", "--device", str(loop))
        said = bay.refused("pool", "create", "q", "--device", str(part), "--yes")
        assert "is mounted on" in said
        bay.ok("pool", "delete", "p", "--yes", "--with-disks")
    finally:
        subprocess.run(["umount", mount], check=True)
    subprocess.run(["fsck.ext4", "-f", "-n", part], check=True, capture_output=True)
