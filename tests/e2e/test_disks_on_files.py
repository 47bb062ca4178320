"""`drivebay disk` on files with a real target: data, refusals, and what a restart keeps."""

from __future__ import annotations

import subprocess

from tests.e2e.bay import MIB, SECTORS, Bay, pattern
from tests.fakes.driver import Session
from tests.fakes.process import wait_until


def test_disks_on_files(bay: Bay) -> None:
    file = bay.folder / "db.img"
    bay.ok("disk", "create", "db", "--file", str(file), "--size", "8M")
    assert file.stat().st_blocks == 0
    bay.write("db", 8, pattern(1))
    assert file.read_bytes()[4096:8192] == pattern(1)
    with Session(bay.attach("db")) as session:
        assert session.capacity() == 8 * SECTORS
        bay.ok("disk", "resize", "db", "--size", "16M")
        wait_until(lambda: session.capacity() == 16 * SECTORS, "the new size")
        live = bay.refused("disk", "resize", "db", "--size", "8M", "--yes-shrink")
        assert "while machines are connected: vhost.db" in live
        assert "vhost.db (1 connected)" in bay.refused("disk", "delete", "db")
        assert "vhost.db" in bay.ok("disk", "list")
    bay.detach("db")
    bay.ok("disk", "resize", "db", "--size", "8M", "--yes-shrink")
    bay.restart()
    assert bay.info("db")["size"] == 8 * MIB
    assert bay.read("db", 8, 4096) == pattern(1)
    bay.ok("disk", "delete", "db")
    assert bay.ok("disk", "list", "-q") == ""
    subprocess.run(["mkfs.ext4", "-q", "-L", "backup", str(file)], check=True)
    said = bay.refused("disk", "create", "db", "--file", str(file))
    assert 'it holds ext4 "backup", 8 MiB' in said
    bay.ok("disk", "create", "db", "--file", str(file), "--yes-use-existing")
    bay.restart(crash=True)
    assert bay.ok("disk", "list", "-q") == "db\n"


def test_a_disk_that_is_split(bay: Bay) -> None:
    file = bay.folder / "big.img"
    with file.open("wb") as stream:
        stream.truncate(64 * MIB)
    assert bay.ok("disk", "create", "--split", str(file), "4").split() == [
        "bigp0", "bigp1", "bigp2", "bigp3",
    ]  # fmt: skip
    for number in range(4):
        bay.write(f"bigp{number}", 16, pattern(number))
    content = file.read_bytes()
    for number in range(4):
        start = number * 16 * MIB + 16 * 512
        assert content[start : start + 4096] == pattern(number)
    bay.restart()
    assert bay.read("bigp2", 16, 4096) == pattern(2)
    assert "is split into" in bay.refused("disk", "delete", "big")
    bay.attach("bigp1")
    assert "vhost.bigp1" in bay.refused("disk", "delete", "big", "--with-parts")
    bay.detach("bigp1")
    bay.ok("disk", "delete", "big", "--with-parts")
    assert bay.target.rpc("bdev_get_bdevs") == []
    bay.restart()
    assert bay.target.rpc("bdev_get_bdevs") == []
