"""vm/store.py: folders of VMs made at once or not at all, whatever lies in their place."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from drivebay.errors import AlreadyExists, HostError, InUse, NotFound, UsageError
from drivebay.vm import store
from drivebay.vm.spec import VmSpec
from drivebay.vm.store import Vm, Vms
from tests.unit.vm_world import MIB, bare


@pytest.fixture
def vms(tmp_path: Path) -> Vms:
    return Vms(tmp_path / "deep" / "vms")


def make(vms: Vms, name: str = "web") -> Vm:
    return vms.create(bare(name), lambda vm: None)


def entries(vms: Vms) -> list[str]:
    return sorted(path.name for path in vms.folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_vm_is_made_listed_read_and_deleted(vms: Vms) -> None:
    assert vms.names() == []
    made = vms.create(bare("web"), lambda vm: vm.seed.touch())
    assert (made.folder, made.name) == (vms.folder / "web", "web")
    assert (mode(vms.folder), mode(made.folder), mode(made.folder / "vm.toml")) == (
        0o700,
        0o700,
        0o600,
    )
    assert vms.load("web") == made
    assert made.seed.is_file()
    make(vms, "db")
    assert vms.names() == ["db", "web"]
    assert [vm.name for vm in vms.all()] == ["db", "web"]
    assert [vm.name for vm in vms.others("web")] == ["db"]
    with vms.locked("web"):
        vms.delete(made)
    assert entries(vms) == ["db"]


def test_what_a_killed_command_has_left_goes_a_day_later(
    vms: Vms, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(vms)
    (vms.folder / ".new-1234" / "keys").mkdir(parents=True)
    os.utime(vms.folder / ".new-1234", (0, 0))  # as a VM's may be that is being deleted now
    make(vms, "db")
    assert entries(vms) == [".new-1234", "db", "web"]
    monkeypatch.setattr(store, "_LEFT_SECONDS", -60.0)
    make(vms, "mail")
    assert entries(vms) == ["db", "mail", "web"]


def test_a_fill_that_fails_leaves_nothing(vms: Vms) -> None:
    def fill(vm: Vm) -> None:
        assert vm.folder.name != "web", "it has its name at the end only"
        (vm.folder / "keys").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vms.create(bare("web"), fill)
    assert entries(vms) == []


def test_what_is_not_finished_is_no_vm(vms: Vms) -> None:
    make(vms)
    (vms.folder / ".new-abc").mkdir()
    (vms.folder / ".new-abc" / "vm.toml").touch()
    (vms.folder / "empty").mkdir()
    assert vms.names() == ["web"]


@pytest.mark.parametrize("how", ["folder", "file", "link", "full folder"])
def test_a_name_is_taken_by_whatever_is_there(vms: Vms, how: str) -> None:
    make(vms, "other")
    there = vms.folder / "web"
    match how:
        case "folder":
            there.mkdir()
        case "full folder":
            there.mkdir()
            (there / "x").touch()
        case "file":
            there.touch()
        case "link":
            there.symlink_to("nowhere")
    with pytest.raises(AlreadyExists, match="there is a VM 'web' already"):
        make(vms)
    assert entries(vms) == ["other", "web"]


@pytest.mark.parametrize("how", ["VM", "file"])
def test_somebody_may_be_quicker(vms: Vms, how: str) -> None:
    def fill(vm: Vm) -> None:
        if how == "VM":
            Vms(vms.folder).create(bare("web", cpus=7), lambda vm: None)
        else:
            (vms.folder / "web").touch()

    with pytest.raises(AlreadyExists, match="there is a VM 'web' already"):
        vms.create(bare("web"), fill)
    assert entries(vms) == ["web"]
    if how == "VM":
        assert vms.load("web").spec.cpus == 7


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a b", "-a", "a-", "a.b", "a_b", "ä", "a\n", "a\0", "x" * 41],
)
def test_odd_names_are_refused_everywhere(vms: Vms, name: str) -> None:
    make(vms)
    for ask in (vms.load, vms.check_free, lambda name: vms.locked(name).__enter__()):
        with pytest.raises(UsageError, match="can't be the name of a VM"):
            ask(name)
    with pytest.raises(UsageError, match="can't be the name of a VM"):
        make(vms, name)
    assert entries(vms) == ["web"]


def test_the_longest_name(vms: Vms) -> None:
    make(vms, "a" + "-" * 38 + "b")
    assert len(vms.names()[0]) == 40


# ---- one that can't be read ---------------------------------------------------------------------


def test_one_that_is_wrong_says_where_and_blocks_no_other(vms: Vms) -> None:
    broken = make(vms, "broken").folder / "vm.toml"
    make(vms)
    broken.write_text("cpus = ")
    with pytest.raises(UsageError, match="vm.toml of 'broken' is not TOML") as caught:
        vms.load("broken")
    assert caught.value.hint == f"mend it: {broken}"
    assert vms.names() == ["broken", "web"]
    assert [vm.name for vm in vms.others("")] == ["web"]
    with pytest.raises(UsageError):
        vms.all()


def test_a_hint_that_is_there_stays(vms: Vms) -> None:
    path = make(vms).folder / "vm.toml"
    path.write_text(path.read_text() + "colour = 3\n")
    with pytest.raises(UsageError, match="'colour'") as caught:
        vms.load("web")
    assert str(caught.value.hint).startswith("known are ")


def test_one_that_is_no_text_or_no_file(vms: Vms) -> None:
    path = make(vms).folder / "vm.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HostError, match=r"can't read '.*/web/vm.toml': Invalid argument"):
        vms.load("web")
    path.unlink()
    path.mkdir()
    with pytest.raises(HostError, match="Is a directory"):
        vms.load("web")


@pytest.mark.parametrize("there", ["nothing", "file", "folder", "dangling link"])
def test_no_such_vm(vms: Vms, there: str) -> None:
    make(vms)
    place = vms.folder / "db"
    match there:
        case "file":
            place.touch()
        case "folder":
            place.mkdir()
        case "dangling link":
            place.symlink_to("nowhere")
    with pytest.raises(NotFound, match="there is no VM 'db'") as caught:
        vms.load("db")
    assert caught.value.hint == "drivebay vm list"


# ---- changes ------------------------------------------------------------------------------------


def test_comments_stay_and_only_its_owner_reads(vms: Vms) -> None:
    vm = make(vms)
    path = vm.folder / "vm.toml"
    path.write_text("# mine\n" + path.read_text())
    path.chmod(0o644)
    vm = vms.load("web")
    saved = vms.save(vm, bare("web", cpus=3))
    assert saved == vms.load("web")
    assert (saved.spec.cpus, saved.text.startswith("# mine\n")) == (3, True)
    assert mode(path) == 0o600
    assert [entry.name for entry in vm.folder.iterdir()] == ["vm.toml"]


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"memory": MIB + 1}, {"memory": MIB}])
def test_what_could_not_be_read_is_not_written(vms: Vms, wrong: dict[str, int]) -> None:
    vm = make(vms)
    with pytest.raises(UsageError):
        vms.save(vm, bare("web", **wrong))
    assert vms.load("web") == vm


def test_a_folder_that_cannot_be_written(vms: Vms) -> None:
    vm = make(vms)
    (vm.folder / ".vm.toml.new").mkdir()  # as a full disk would: also for root
    with pytest.raises(HostError, match=r"can't write '.*/web/vm.toml'"):
        vms.save(vm, bare("web", cpus=3))
    assert vms.load("web") == vm


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    vms = Vms(tmp_path / "file" / "vms")
    assert vms.names() == []
    with pytest.raises(HostError, match="can't make"):
        make(vms)
    vms = Vms(tmp_path / "file")
    with pytest.raises(HostError, match="can't make"):
        make(vms)


def test_a_full_disk_at_the_first_step(vms: Vms, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> str:
        raise OSError(28, "No space left on device")

    make(vms)
    monkeypatch.setattr("drivebay.vm.store.tempfile.mkdtemp", full)
    with pytest.raises(HostError, match="can't make a folder in .*: No space left"):
        make(vms, "db")


# ---- one at a time ------------------------------------------------------------------------------


def test_a_lock_keeps_others_away(vms: Vms) -> None:
    make(vms)
    make(vms, "db")
    with vms.locked("web"):
        with (
            pytest.raises(InUse, match="changes, starts or stops VM 'web' right now"),
            vms.locked("web"),
        ):
            pass
        with vms.locked("db"):
            pass
        code = "import sys; from drivebay.vm.store import Vms; from pathlib import Path\n"
        code += "Vms(Path(sys.argv[1])).locked('web').__enter__()"
        done = subprocess.run(
            [sys.executable, "-c", code, str(vms.folder)], capture_output=True, text=True
        )
        assert "InUse" in done.stderr
    with vms.locked("web"):
        pass
    assert mode(vms.folder / ".lock-web") == 0o600


def test_a_lock_ends_with_a_failure(vms: Vms) -> None:
    make(vms)
    with pytest.raises(KeyError), vms.locked("web"):
        raise KeyError
    with vms.locked("web"):
        pass


def test_a_child_does_not_inherit_a_lock(vms: Vms) -> None:
    make(vms)
    with vms.locked("web"):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    with vms.locked("web"):
        child.kill()
        child.wait()


def test_what_is_not_there_cannot_be_locked_and_leaves_no_file(vms: Vms) -> None:
    make(vms)
    with pytest.raises(NotFound, match="there is no VM 'db'"), vms.locked("db"):
        pass
    assert entries(vms) == ["web"]


def test_a_lock_that_cannot_be_made(vms: Vms) -> None:
    make(vms)
    (vms.folder / ".lock-web").mkdir()
    with pytest.raises(HostError, match="can't lock"), vms.locked("web"):
        pass


# ---- deleting -----------------------------------------------------------------------------------


def test_of_a_link_only_the_link_is_deleted(vms: Vms) -> None:
    make(vms)
    (vms.folder / "two").symlink_to("web")
    two = vms.load("two")
    assert two.name == "two"
    vms.delete(two)
    assert entries(vms) == ["web"]
    assert vms.load("web").spec == bare("web")


def test_what_is_gone_already_is_said(vms: Vms) -> None:
    vm = make(vms)
    vms.delete(vm)
    with pytest.raises(HostError, match=r"can't remove '.*/web': No such file"):
        vms.delete(vm)


def test_links_inside_are_not_followed(vms: Vms, tmp_path: Path) -> None:
    vm = make(vms)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (vm.folder / "link").symlink_to(tmp_path / "mine")
    os.link(tmp_path / "mine" / "file", vm.folder / "hard")
    vms.delete(vm)
    assert (tmp_path / "mine" / "file").exists()


def test_each_file_has_its_place(vms: Vms) -> None:
    vm = make(vms)
    names = [vm.keys, vm.seed, vm.firmware_variables, vm.monitor_socket, vm.console_socket,
             vm.agent_socket, vm.console_log, vm.qemu_log, vm.running_file]  # fmt: skip
    assert {path.parent for path in names} == {vm.folder}
    assert len(set(names)) == len(names)


def test_the_usual_place_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Vms().folder == tmp_path / "drivebay" / "vms"


def test_a_copied_folder_is_a_vm_more(vms: Vms) -> None:
    vm = make(vms)
    copy = vms.folder / "copy"
    copy.mkdir()
    (copy / "vm.toml").write_text(vm.text)
    spec: VmSpec = vms.load("copy").spec
    assert (spec.name, spec.uuid) == ("copy", vm.spec.uuid)
