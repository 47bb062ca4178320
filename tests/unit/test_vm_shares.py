"""vm/shares.py, vm/virtiofsd.py: which folders, served by whom, and what is said when they are not.

A program of the test stands for virtiofsd; tests/e2e/test_vm_share.py has the real ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import HostError, NotFound, StateError, UsageError
from drivebay.system.processes import Child, start
from drivebay.vm import shares, virtiofsd
from drivebay.vm.shares import check_shares, read_share, serve_shares
from drivebay.vm.spec import ShareSpec
from drivebay.vm.store import Vm
from drivebay.vm.virtiofsd import Virtiofsd, find_virtiofsd
from tests.unit.vm_world import World

# It answers what it is asked first, and lives until the other side hangs up.
SERVES = """\
import socket, sys
listening = socket.socket(fileno=int(sys.argv[1].partition("=")[2]))
connection, _ = listening.accept()
asked = connection.recv(12)
connection.sendall(asked[:4] + bytes(4))
connection.sendall(bytes([8, 0, 0, 0]) + bytes(8))
print("asked", asked.hex(), *sys.argv[2:], flush=True)
connection.recv(1)
"""
FAILS = "print('starting'); print('no memory left for it'); raise SystemExit(1)"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH leads here first; no virtiofsd of the host is found."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(virtiofsd, "ELSEWHERE", ())
    return folder


def program(folder: Path, code: str, said: str = "usage: virtiofsd") -> None:
    (folder / "code.py").write_text(code)
    (folder / "virtiofsd").write_text(
        f'#!/bin/sh\n[ "$1" = --help ] && echo "{said}" && exit\n'
        f'exec "{sys.executable}" -I -S "{folder}/code.py" "$@"\n'
    )
    (folder / "virtiofsd").chmod(0o755)


def sharing(world: World, *directories: Path) -> Vm:
    made = [ShareSpec(str(directory), directory.name) for directory in directories]
    return world.vm("web", shares=tuple(made))


# ---- what is written on the command line --------------------------------------------------------


def test_a_share_is_a_folder_its_tag_and_whether_it_may_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "my src:1"
    folder.mkdir()
    assert read_share(f"{folder}:src") == ShareSpec(str(folder), "src")
    assert read_share(f"{folder}:src,ro") == ShareSpec(str(folder), "src", True)
    assert read_share(f"{folder}/../my src:1/:x").directory == str(folder)
    plain = tmp_path / "a b.c"
    plain.mkdir()
    assert read_share(str(plain)) == ShareSpec(str(plain), "a-b.c")
    assert read_share(f"{plain},ro") == ShareSpec(str(plain), "a-b.c", True)


def test_a_link_is_followed_when_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert read_share(f"{tmp_path}/link") == ShareSpec(f"{tmp_path}/real", "real")


def test_a_relative_folder_holds_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_share("src:s").directory == str(tmp_path / "src")


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file' of the share '.*/file' is no folder"):
        read_share(f"{tmp_path}/file")
    with pytest.raises(NotFound, match=r"/gone' of the share .* is not there") as caught:
        read_share(f"{tmp_path}/gone:x,ro")
    assert caught.value.hint == f"mkdir {tmp_path}/gone"
    with pytest.raises(UsageError, match="names no folder"):
        read_share(":tag")
    with pytest.raises(UsageError, match="'/' of the share .* is all of this host"):
        read_share("/usr/..:host,ro")
    (tmp_path / "#").mkdir()
    with pytest.raises(UsageError, match="the folder '.*/#' needs a tag"):
        read_share(f"{tmp_path}/#")
    with pytest.raises(HostError, match="can't look into the folder"):
        read_share("/" + "x" * 300)


# ---- which virtiofsd ----------------------------------------------------------------------------


def test_the_older_virtiofsd_has_options_of_its_own(programs: Path) -> None:
    program(programs, "", "virtiofsd -o source=PATH")
    found = find_virtiofsd("it")
    assert found == Virtiofsd(programs / "virtiofsd", in_rust=False)
    assert found.command("/a,b\\c", 7, 99) == [
        str(found.path), "--fd=7", "--rlimit-nofile=99", "-o",
        "source=/a\\,b\\\\c,sandbox=namespace,modcaps=-mknod,cache=auto",
    ]  # fmt: skip


def test_the_newer_virtiofsd_too(programs: Path) -> None:
    program(programs, "", "virtiofsd --shared-dir DIR")
    found = find_virtiofsd("it")
    assert found.in_rust
    words = ["--shared-dir=/a,b", "--sandbox=namespace", "--modcaps=-mknod", "--cache=auto"]
    assert found.command("/a,b", 7, 99)[3:] == words


def test_one_that_is_elsewhere_is_found_after_that_on_path(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    program(tmp_path / "other", "")
    monkeypatch.setattr(virtiofsd, "ELSEWHERE", ("/nonexistent", f"{tmp_path}/other/virtiofsd"))
    assert find_virtiofsd("it").path == tmp_path / "other/virtiofsd"
    program(programs, "")
    assert find_virtiofsd("it").path == programs / "virtiofsd"


def test_none_is_there(programs: Path, world: World, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"VM 'web' with --share needs virtiofsd") as caught:
        check_shares(sharing(world, tmp_path))
    assert "virtiofsd" in str(caught.value.hint)
    check_shares(world.vm("db"))
    program(programs, "", "segmentation fault")
    with pytest.raises(NotFound, match=r"is no virtiofsd that runs: segmentation fault"):
        find_virtiofsd("it")
    (programs / "virtiofsd").write_text("#!/nonexistent\n")
    with pytest.raises(NotFound, match="does not say what it is"):
        find_virtiofsd("it")


# ---- serving ------------------------------------------------------------------------------------


def test_a_folder_that_is_gone_is_missed_before_anything_starts(
    programs: Path, world: World, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="the folder '.*/gone' of VM 'web' is not there"):
        check_shares(sharing(world, tmp_path / "gone"))


def test_each_folder_has_a_program_and_a_connection(
    programs: Path, world: World, tmp_path: Path
) -> None:
    program(programs, SERVES)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    vm = sharing(world, *folders)
    with serve_shares(vm) as served:
        assert list(served.connections) == ["a", "b"]
        children = list(served._children)
        assert [child.ended() for child in children] == [False, False]
        assert not (vm.folder / "share.sock").exists(), "nobody else can connect"
    assert [child.ended() for child in children] == [True, True], "QEMU never had them"
    said = (vm.folder / "share-a.log").read_text()
    assert said.startswith("asked 010000000100000000000000 --rlimit-nofile=")
    assert f"source={folders[0]}" in said


def test_they_live_on_as_long_as_their_connection(
    programs: Path, world: World, tmp_path: Path
) -> None:
    program(programs, SERVES)
    vm = sharing(world, tmp_path)
    with serve_shares(vm) as served:
        (child,) = served._children
        qemus = os.dup(served.connections[tmp_path.name])
        served.let_go()
    child.process.returncode = None
    assert not child.ended()
    os.close(qemus)
    assert child.process.wait(20) == 0


def test_one_that_ends_says_why_and_takes_the_others_with_it(
    programs: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    program(programs, f"import sys\nif 'bad' in sys.argv[-1]:\n    {FAILS}\n{SERVES}")
    started: list[Child] = []

    def noted(*words: Any, **more: Any) -> Child:
        started.append(start(*words, **more))
        return started[-1]

    monkeypatch.setattr(shares, "start", noted)
    vm = sharing(world, tmp_path / "good", tmp_path / "bad")
    with (
        pytest.raises(
            StateError,
            match=r"/bad' can't be shared with VM 'web': virtiofsd said: no memory left for it",
        ) as caught,
        serve_shares(vm),
    ):
        pass
    assert "share-bad.log" in str(caught.value.hint)
    assert started[0].ended()


def test_one_that_is_silent_is_ended(
    programs: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ANSWER_SECONDS", 0.05)
    program(programs, "import time\ntime.sleep(600)")
    with pytest.raises(StateError, match="virtiofsd said: nothing"), \
            serve_shares(sharing(world, tmp_path)):  # fmt: skip
        pass


def test_without_folders_nothing_is_needed(programs: Path, world: World) -> None:
    with serve_shares(world.vm("web")) as served:
        assert served.connections == {}
