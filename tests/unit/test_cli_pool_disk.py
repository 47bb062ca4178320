"""Which calls the commands of pools and disks make, and what they refuse, with which words.

The target is a model (tests.fakes.lvol_target) behind a real socket; tests/e2e has the real one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli.completion import candidates
from drivebay.cli.main import main
from drivebay.disks import places
from tests.fakes.lvol_target import CLUSTER, Base, LvolTarget
from tests.unit.command import Done, Run, run_command

GIB = 1 << 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """pytest's own may be too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@pytest.fixture
def target(folder: Path) -> Iterator[LvolTarget]:
    served = LvolTarget(folder / "s")
    yield served
    served.close()


@pytest.fixture
def run(
    folder: Path,
    target: LvolTarget,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))

    def words(group: str, subcommand: str, *more: str) -> Done:
        return run_command(capsys, group, subcommand, "-s", str(folder / "s"), *more)

    return words


@pytest.fixture
def pool(run: Run, target: LvolTarget, folder: Path) -> str:
    """A pool 'p' in a file of 1 GiB; the calls that made it are forgotten."""
    assert run("pool", "create", "p", "--file", str(folder / "p.img"), "--size", "1G").code == 0
    target.calls.clear()
    return "p"


# ---- pools --------------------------------------------------------------------------------------


def test_a_pool_in_a_file_is_made_shown_grown_and_deleted(
    run: Run, target: LvolTarget, folder: Path
) -> None:
    file = folder / "deep" / "p.img"
    made = run("pool", "create", "p", "--file", str(file), "--size", "1G", "--json")
    assert made.code == 0, made.err
    assert (made.json["name"], made.json["place"], made.json["disks"]) == ("p", str(file), [])
    assert file.stat().st_size == GIB
    assert file.stat().st_blocks == 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert target.calls == [
        ("bdev_aio_create", {"name": "pool-p", "filename": str(file)}),
        ("bdev_lvol_create_lvstore", {"bdev_name": "pool-p", "lvs_name": "p"}),
    ]
    assert run("pool", "list", "-q").out == "p\n"
    assert "1020 MiB" in run("pool", "list").out
    grown = run("pool", "grow", "p", "--size", "2G")
    assert grown.code == 0, grown.err
    assert target.names()[2:] == ["bdev_aio_rescan", "bdev_lvol_grow_lvstore"]
    assert file.stat().st_size == 2 * GIB
    smaller = run("pool", "grow", "p", "--size", "1G")
    assert "a pool can't be made smaller" in smaller.err
    assert "can't grow beyond 1 TiB" in run("pool", "grow", "p", "--size", "2T").err
    deleted = run("pool", "delete", "p", "--yes")
    assert deleted.code == 0, deleted.err
    assert not file.exists()
    assert target.names()[4:] == ["bdev_lvol_delete_lvstore", "bdev_aio_delete"]
    assert run("pool", "info", "p").code == 1


def test_a_pool_that_cannot_be_made_leaves_nothing(
    run: Run, target: LvolTarget, folder: Path
) -> None:
    target.failing.add("bdev_lvol_create_lvstore")
    failed = run("pool", "create", "p", "--file", str(folder / "p.img"), "--size", "1G")
    assert failed.code == 1
    assert "bdev_lvol_create_lvstore: Input/output error" in failed.err
    assert not (folder / "p.img").exists()
    assert target.names() == ["bdev_aio_create", "bdev_aio_delete"]


def test_a_file_with_data_is_never_made_a_pool(run: Run, target: LvolTarget, folder: Path) -> None:
    file = folder / "p.img"
    file.write_bytes(b"precious".ljust(1 << 20))
    refused = run("pool", "create", "p", "--file", str(file), "--size", "1G")
    assert refused.code == 1
    assert f"the file '{file}' is not empty: it holds data" in refused.err
    file.write_bytes(b"SPDKBLOB".ljust(56, b"\0") + b"LVOLSTORE".ljust(1 << 20, b"\0"))
    assert "it holds pool" in run("pool", "create", "p", "--file", str(file)).err
    assert target.calls == []
    # A file that was never written is as good as none, and keeps its own size without --size.
    empty = folder / "empty.img"
    with empty.open("wb") as stream:
        stream.truncate(GIB)
    assert run("pool", "create", "p", "--file", str(empty)).code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("p",), 2, "one of the arguments --file --device is required"),
        (("p", "--file", "f", "--device", "d"), 2, "not allowed with argument"),
        (("a/b", "--file", "f", "--size", "1G"), 2, "can't be the name of a pool"),
        (("p", "--file", "f"), 2, "there is no file"),
        (("p", "--file", "f", "--size", "1M"), 2, "too small for a pool"),
        (("p", "--file", "f", "--size", "many"), 2, "is not a size"),
        (("p", "--device", "nosuch"), 1, "can't find 'nosuch'"),
        (("p", "--device", "."), 2, "is no block device"),
        (("p", "--file", "."), 2, "is no file"),
    ],
)
def test_pools_that_make_no_sense(
    run: Run, target: LvolTarget, folder: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    done = run("pool", "create", *words)
    assert done.code == code
    assert said in done.err
    assert target.calls == []
    assert set(folder.iterdir()) == before


def test_a_file_for_a_target_of_another_user_is_refused(
    run: Run, target: LvolTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "target_owner", lambda socket: (os.getpid(), 4242))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused = run("pool", "create", "p", "--file", str(folder / "p"), "--size", "1G")
    assert "the target runs as user 4242 and could not open a file that user 1000" in refused.err
    assert not (folder / "p").exists()


def test_a_file_that_the_target_would_not_find_is_refused(
    run: Run, target: LvolTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose folders cannot be seen at all stands for one that sees others."""
    nobody = 1 << 23  # beyond the largest process id
    monkeypatch.setattr(places, "target_owner", lambda socket: (nobody, os.geteuid()))
    refused = run("pool", "create", "p", "--file", str(folder / "p"), "--size", "1G")
    assert "sees other folders than this command" in refused.err
    assert not (folder / "p").exists()


def test_a_pool_with_disks_is_deleted_only_when_told(
    run: Run, target: LvolTarget, pool: str
) -> None:
    run("disk", "create", "web", "--size", "1G")
    run("disk", "create", "db", "--size", "1G")
    refused = run("pool", "delete", "p", "--yes")
    assert refused.code == 1
    assert "pool 'p' holds 2 disks: web, db" in refused.err
    target.show("vhost.0", target.volumes["p", "web"].uuid)
    used = run("pool", "delete", "p", "--yes", "--with-disks")
    assert used.code == 1
    assert "web on vhost.0" in used.err
    target.controllers.clear()
    assert run("pool", "delete", "p", "--with-disks").code == 1, "it has to ask"
    gone = run("pool", "delete", "p", "--yes", "--with-disks", "--json")
    assert gone.json == {"deleted": "p", "disks": ["web", "db"]}


def test_the_list_warns_at_four_fifths(run: Run, target: LvolTarget, pool: str) -> None:
    run("disk", "create", "web", "--size", "512M")
    assert run("pool", "list").err == ""
    run("disk", "create", "db", "--size", "400M")
    promised = run("pool", "list")
    assert "912 MiB of 1020 MiB" in promised.out
    assert "89% of pool 'p' is promised to its disks" in promised.err
    target.volumes["p", "web"].allocated = 210
    full = run("pool", "list")
    assert "pool 'p' is 82% full: 840 MiB of 1020 MiB" in full.err
    (shown,) = run("pool", "list", "--json").json
    assert (shown["promised"], shown["used"], shown["real"]) == (912 << 20, 840 << 20, 1020 << 20)
    assert "82% full" in shown["warning"]


def test_real_space_of_a_sparse_file_is_what_its_file_system_has_left(
    run: Run, target: LvolTarget, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.disks.space.free_bytes", lambda path: 100 << 20)
    run("disk", "create", "web", "--size", "512M")
    listed = run("pool", "list")
    assert "512 MiB of 100 MiB" in listed.out
    assert "512% of pool 'p' is promised" in listed.err


# ---- disks --------------------------------------------------------------------------------------


def test_the_first_disk_makes_the_default_pool(run: Run, target: LvolTarget, folder: Path) -> None:
    shown = run("disk", "create", "web", "--size", "10G", "--dry-run")
    file = folder / "data" / "drivebay" / "pools" / "default.img"
    assert f"would make the file '{file}'" in shown.out
    assert "would make the thin disk 'web' of 10 GiB in pool 'default'" in shown.out
    assert target.calls == []
    assert not file.exists()
    assert run("disk", "create", "web", "--size", "10G", "-q").out == "web\n"
    assert file.stat().st_blocks == 0
    free = os.statvfs(folder)
    assert 0.5 < file.stat().st_size / (free.f_bavail * free.f_frsize) < 0.9
    assert run("disk", "create", "db", "--size", "1G", "--thick").code == 0
    assert [name for name, _ in target.calls] == [
        "bdev_aio_create", "bdev_lvol_create_lvstore", "bdev_lvol_create", "bdev_lvol_create",
    ]  # fmt: skip
    assert target.calls[-1][1] == {
        "lvol_name": "db", "size_in_mib": 1024, "thin_provision": False, "lvs_name": "default",
    }  # fmt: skip


def test_which_pool_is_meant(run: Run, target: LvolTarget, folder: Path, pool: str) -> None:
    run("pool", "create", "q", "--file", str(folder / "q.img"), "--size", "1G")
    several = run("disk", "create", "web", "--size", "1G")
    assert several.code == 2
    assert "there are several pools: p, q" in several.err
    assert run("disk", "create", "web", "--size", "1G", "--pool", "q").code == 0
    assert run("disk", "create", "x", "--size", "1G", "--pool", "nosuch").code == 1
    twice = run("disk", "create", "web", "--size", "1G", "--pool", "p")
    assert "there is a disk 'web' already" in twice.err
    # Made by others, the same name may be in two pools.
    target.bdev_lvol_create("web", 4, "p")
    both = run("disk", "info", "web")
    assert both.code == 2
    assert "'web' is the name of 2 disks: q/web, p/web" in both.err
    assert run("disk", "info", "p/web", "--json").json["size"] == CLUSTER


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the disk has no name"),
        (("web",), "the disk has no size"),
        (("web", "--size", "1000"), "whole number of MiB"),
        (("web", "--size", "0"), "whole number of MiB"),
        (("w@b", "--size", "1G"), "can't be the name of a disk"),
        (("web", "--size", "8G", "--thick"), "has 1020 MiB left, too little for a thick disk"),
        (("web", "--size", "1G", "--file", "f", "--thick"), "--thick is for disks in pools"),
        (("web", "--file", "f"), "there is no file"),
        (("web", "--split", "p", "2"), "the parts of a split are named after"),
        (("--split", "p", "1"), "'1' is no number of parts"),
        (("--split", "p", "2", "--thick"), "--thick is for disks in pools"),
    ],
)
def test_disks_that_make_no_sense(
    run: Run, target: LvolTarget, pool: str, words: tuple[str, ...], said: str
) -> None:
    done = run("disk", "create", *words)
    assert done.code == (1 if "too little" in said else 2)
    assert said in done.err
    assert target.calls == []


def test_a_file_with_a_file_system_needs_a_word(run: Run, target: LvolTarget, folder: Path) -> None:
    file = folder / "old.img"
    content = bytearray(1 << 20)
    content[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"
    content[1024 + 0x78 : 1024 + 0x7E] = b"backup"
    content[1024 + 0x04 : 1024 + 0x08] = (1024).to_bytes(4, "little")
    file.write_bytes(content)
    for words in (("old", "--file", str(file)), ("--split", str(file), "2")):
        refused = run("disk", "create", *words)
        assert refused.code == 1
        assert f"'{file}' is not empty: it holds ext2 \"backup\", 1 MiB" in refused.err
    assert target.calls == []
    assert run("disk", "create", "old", "--file", str(file), "--yes-use-existing").code == 0
    assert target.calls == [("bdev_aio_create", {"name": "old", "filename": str(file)})]
    wrong = run("disk", "create", "o2", "--file", str(file), "--size", "1G")
    assert "is there already, with 1 MiB" in wrong.err


def test_a_disk_on_a_file_is_made_resized_and_let_go(
    run: Run, target: LvolTarget, folder: Path
) -> None:
    file = folder / "db.img"
    assert run("disk", "create", "db", "--file", str(file), "--size", "1G").code == 0
    assert run("disk", "resize", "db", "--size", "2G").code == 0
    assert file.stat().st_size == 2 * GIB
    refused = run("disk", "resize", "db", "--size", "1G")
    assert refused.code == 1
    assert "what lies behind 1 GiB would be lost" in refused.err
    assert run("disk", "resize", "db", "--size", "1G", "--yes-shrink").code == 0
    assert file.stat().st_size == GIB
    target.show("vhost.0", "db", sessions=1)
    live = run("disk", "resize", "db", "--size", "512M", "--yes-shrink")
    assert live.code == 1
    assert "while machines are connected: vhost.0" in live.err
    assert run("disk", "resize", "db", "--size", "3G").code == 0
    in_use = run("disk", "delete", "db")
    assert "controllers show disk 'db' to machines: vhost.0 (1 connected)" in in_use.err
    target.controllers.clear()
    assert run("disk", "delete", "db").out == "disk 'db' deleted\n"
    assert file.exists()
    for words in (("snapshot", "db"), ("clone", "db", "x")):
        run("disk", "create", "db", "--file", str(file), "--yes-use-existing")
        assert "only disks in pools" in run("disk", *words).err


def test_a_file_is_split_and_joined(run: Run, target: LvolTarget, folder: Path) -> None:
    file = folder / "big.img"
    with file.open("wb") as stream:
        stream.truncate(GIB)
    assert run("disk", "create", "--split", str(file), "4").out == "bigp0\nbigp1\nbigp2\nbigp3\n"
    assert target.calls == [
        ("bdev_aio_create", {"name": "big", "filename": str(file)}),
        ("bdev_split_create", {"base_bdev": "big", "split_count": 4}),
    ]
    assert run("disk", "list", "-q").out.split() == ["bigp0", "bigp1", "bigp2", "bigp3"]
    assert "(part of big)" in run("disk", "list").out
    assert "parts are made and deleted together" in run("disk", "delete", "bigp1").err
    assert "is split into bigp0" in run("disk", "delete", "big").err
    target.show("vhost.2", "bigp2")
    assert "vhost.2" in run("disk", "delete", "big", "--with-parts").err
    target.controllers.clear()
    assert run("disk", "delete", "big", "--with-parts").code == 0
    assert target.bases == {}
    assert run("disk", "create", "whole", "--file", str(file)).code == 0
    sized = run("disk", "create", "--split", "whole", "2", "--size", "100M", "--json")
    assert [part["size"] for part in sized.json] == [100 << 20] * 2
    assert "something stands on it" in run("disk", "create", "--split", "whole", "2").err
    assert run("disk", "delete", "whole", "--with-parts").code == 0
    run("disk", "create", "whole", "--file", str(file))
    assert "are more than" in run("disk", "create", "--split", "whole", "8", "--size", "1G").err


def test_snapshots_are_made_and_gone_back_to(run: Run, target: LvolTarget, pool: str) -> None:
    run("disk", "create", "web", "--size", "512M")
    target.volumes["p", "web"].allocated = 10
    assert run("disk", "snapshot", "web", "one", "-q").out == "web@one\n"
    target.volumes["p", "web"].allocated = 5
    run("disk", "resize", "web", "--size", "600M")
    timed = run("disk", "snapshot", "web", "--json").json["name"]
    assert timed.startswith("web@20")
    shown = run("disk", "info", "web", "--json").json
    assert shown["snapshots"] == ["one", timed.removeprefix("web@")]
    assert shown["parent"] == timed
    assert "has a snapshot 'one' already" in run("disk", "snapshot", "web", "one").err
    assert "is too long" in run("disk", "snapshot", "web", "x" * 60).err
    assert "is a snapshot" in run("disk", "snapshot", "web@one").err
    target.calls.clear()
    assert run("disk", "revert", "web", "one").code == 1, "it has to ask"
    back = run("disk", "revert", "web", "one", "--yes", "--json")
    assert (back.json["size"], back.json["used"], back.json["parent"]) == (512 << 20, 0, "web@one")
    assert back.json["snapshots"] == ["one", timed.removeprefix("web@")]
    assert target.calls == [
        ("bdev_lvol_snapshot", {"lvol_name": "p/web", "snapshot_name": "web@@"}),
        ("bdev_lvol_resize", {"name": "p/web", "size_in_mib": 512}),
        ("bdev_lvol_set_parent", {"lvol_name": "p/web", "parent_name": "p/web@one"}),
        ("bdev_lvol_delete", {"name": "p/web@@"}),
    ]
    dry = run("disk", "revert", "web", "web@one", "--dry-run")
    assert "would make 'web' 512 MiB large" not in dry.out, "it has that size"
    target.show("vhost.0", "p/web", sessions=2)
    live = run("disk", "revert", "web", "one", "--yes")
    assert "machines that are connected: vhost.0" in live.err
    nosuch = run("disk", "revert", "web", "nosuch", "--yes")
    target.controllers.clear()
    nosuch = run("disk", "revert", "web", "nosuch", "--yes")
    assert f"hint: it has: one, {timed.removeprefix('web@')}" in nosuch.err


@pytest.mark.parametrize(
    "failing", ["bdev_lvol_snapshot", "bdev_lvol_resize", "bdev_lvol_set_parent"]
)
def test_a_revert_that_fails_changes_nothing(
    run: Run, target: LvolTarget, pool: str, failing: str
) -> None:
    run("disk", "create", "web", "--size", "512M")
    run("disk", "snapshot", "web", "one")
    run("disk", "resize", "web", "--size", "600M")
    target.volumes["p", "web"].allocated = 7
    before = run("disk", "info", "web", "--json").json
    target.failing.add(failing)
    assert run("disk", "revert", "web", "one", "--yes").code == 1
    if failing != "bdev_lvol_resize":  # then it could not be taken back either
        assert run("disk", "info", "web", "--json").json == before
    # What a target that died between two steps has left is cleared away first.
    target.failing.clear()
    if ("p", "web@@") not in target.volumes:
        target.bdev_lvol_snapshot("p/web", "web@@")
    assert run("disk", "info", "web", "--json").json["snapshots"] == ["one", "@"]
    assert run("disk", "revert", "web", "one", "--yes").code == 0
    after = run("disk", "info", "web", "--json").json
    assert (after["size"], after["parent"], after["snapshots"]) == (512 << 20, "web@one", ["one"])


def test_clones_keep_what_they_read_from(run: Run, target: LvolTarget, pool: str) -> None:
    run("disk", "create", "web", "--size", "512M")
    run("disk", "snapshot", "web", "s")
    assert run("disk", "clone", "web@s", "a").code == 0
    assert run("disk", "clone", "web", "b").code == 0
    assert run("disk", "info", "web", "--json").json["clones"] == ["a", "b"]
    assert run("disk", "info", "a", "--json").json["snapshots"] == []
    refused = run("disk", "delete", "web", "--yes", "--with-snapshots")
    assert refused.code == 1
    assert "disk 'web' has clones, which read from its snapshots: a, b" in refused.err
    two = run("disk", "delete", "web@s", "--yes")
    assert "2 disks and snapshots read from 'web@s': a, web@b" in two.err or (
        "2 disks and snapshots read from 'web@s': web@b, a" in two.err
    )
    assert run("disk", "delete", "a", "--yes").code == 0
    assert run("disk", "delete", "web@s").out == "snapshot 'web@s' deleted\n"
    run("disk", "delete", "b", "--yes")
    snapshots = run("disk", "delete", "web", "--yes")
    assert "disk 'web' has snapshots: b" in snapshots.err
    assert run("disk", "delete", "web", "--with-snapshots").code == 1, "it has to ask"
    assert run("disk", "delete", "web", "--with-snapshots", "--yes").code == 0
    assert target.volumes == {}


def test_a_full_clone_needs_nothing_else(run: Run, target: LvolTarget, pool: str) -> None:
    run("disk", "create", "web", "--size", "512M")
    run("disk", "snapshot", "web", "s")
    target.calls.clear()
    full = run("disk", "clone", "web", "copy", "--full", "--json")
    assert full.json["parent"] is None
    assert [name for name, _ in target.calls] == [
        "bdev_lvol_snapshot", "bdev_lvol_clone", "bdev_lvol_decouple_parent",
        "bdev_lvol_decouple_parent", "bdev_lvol_delete",
    ]  # fmt: skip
    assert run("disk", "info", "web", "--json").json["snapshots"] == ["s"]
    target.failing.add("bdev_lvol_clone")
    failed = run("disk", "clone", "web", "other")
    assert failed.code == 1
    assert ("p", "web@other") not in target.volumes


def test_limits(run: Run, target: LvolTarget, pool: str) -> None:
    run("disk", "create", "web", "--size", "1G")
    assert run("disk", "limit", "web", "--iops", "5000", "--read-mbps", "20").out == (
        "web: 5000 IOPS, 20 MiB/s read\n"
    )
    assert target.calls[-1] == (
        "bdev_set_qos_limit", {"name": "p/web", "rw_ios_per_sec": 5000, "r_mbytes_per_sec": 20}
    )  # fmt: skip
    assert "5000 IOPS, 20 MiB/s read" in run("disk", "list").out
    off = run("disk", "limit", "web", "--iops", "0", "--json").json
    assert off == {"name": "web", "limits": {"r_mbytes_per_sec": 20}}
    assert run("disk", "limit", "web").code == 2
    assert run("disk", "limit", "web", "--mbps", "-1").code == 2


def test_what_others_made_is_shown_and_left_alone(run: Run, target: LvolTarget) -> None:
    target.bases["M0"] = Base("M0", 64 << 20, {}, "Malloc disk")
    assert "(Malloc disk)" in run("disk", "list").out
    assert "is a Malloc disk, which this command did not make" in run("disk", "delete", "M0").err
    assert (
        "its size is that of what it stands on" in run("disk", "resize", "M0", "--size", "1G").err
    )


def test_without_a_target_the_exit_code_says_so(folder: Path) -> None:
    for group in ("pool", "disk"):
        assert main([group, "list", "-s", str(folder / "nobody")]) == 3


def test_completion() -> None:
    assert candidates(["pool", ""]) == ["create", "list", "info", "grow", "delete"]
    assert candidates(["disk", "re"]) == ["resize", "revert"]
    assert "--yes-use-existing" in candidates(["disk", "create", "web", "--"])
