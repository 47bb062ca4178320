"""`drivebay vm create --iso`, `set --iso`, `eject`, `start --boot iso`: the CD of a VM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli import vm_change, vm_create
from drivebay.cli.main import main
from drivebay.host import machine
from drivebay.vm import cd
from drivebay.vm.qemu import Qemu
from drivebay.vm.store import Vm
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.iso_files import write_iso
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process

ABLE = frozenset({"memfd", "user-net", "vhost-user-blk"})
QEMU = Qemu(Path("/q"), (7, 2), ABLE, ("pc-q35-7.2",), "pc-q35-7.2")
CLUSTER = 4 << 20
LOCKED = Refuses("Device 'cd' is locked and force was not specified")
EJECT = ("eject", {"id": "cd"})
LET_GO = ("blockdev-del", {"node-name": "cd-medium"})


@pytest.fixture
def iso(world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ISO; the world has a pool 'p'."""
    for module in (vm_create, vm_change):
        monkeypatch.setattr(module, "find_qemu", lambda named: QEMU)
    world.pool()
    return str(write_iso(world.folder / "debian 12.iso", {"/a": b"a"}))


@pytest.fixture
def running(world: World, iso: str) -> Iterator[FakeMonitor]:
    """The VM 'web' seems to run with that ISO."""
    with idle_process() as process:
        yield from runs(world.vm("web", iso=iso), process)


def runs(vm: Vm, process: subprocess.Popen[bytes]) -> Iterator[FakeMonitor]:
    seem_to_run(vm, process)
    fake = FakeMonitor(vm.monitor_socket)
    yield fake
    fake.close()


def run(world: World, *words: str) -> int:
    return main(["vm", *words, "-s", world.socket])


def asked(monitor: FakeMonitor) -> list[tuple[str, object]]:
    return [each for each in monitor.heard if each[0] != "qmp_capabilities"]


# ---- create and set -----------------------------------------------------------------------------


def test_an_iso_is_installed_to_an_empty_disk_and_nobody_is_told_who_to_be(
    world: World, iso: str
) -> None:
    assert run(world, "create", "web", "--iso", iso) == 0
    spec = world.vms.load("web").spec
    assert (spec.iso, spec.image, spec.cloud_init) == (iso, None, None)
    assert [disk.bdev for disk in spec.disks] == ["p/web-system"]
    assert world.target.volumes["p", "web-system"].clusters == (20 << 30) // CLUSTER


def test_what_is_asked_for_is_made_instead(world: World, iso: str) -> None:
    world.image("tiny")
    assert run(world, "create", "web", "--iso", iso, "--disk", "64M", "--user", "anna") == 0
    spec = world.vms.load("web").spec
    assert spec.cloud_init is not None
    assert spec.cloud_init.user == "anna"
    assert world.target.volumes["p", "web-system"].clusters == (64 << 20) // CLUSTER
    assert run(world, "create", "db", "--iso", iso, "--image", "tiny") == 0
    spec = world.vms.load("db").spec
    assert (spec.image, len(spec.disks), spec.cloud_init is None) == ("tiny", 1, False)
    assert run(world, "create", "no", "--iso", "none", "--image", "none") == 0
    assert world.vms.load("no").spec.iso is None


def test_no_iso_no_vm(world: World, iso: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(world, "create", "web", "--iso", "/nonexistent") == 1
    assert run(world, "create", "web", "--iso", "/dev/null", "--disk", "64M") == 2
    assert "can't read the ISO" in capsys.readouterr().err
    assert (world.vms.names(), world.volumes()) == ([], [])


def test_a_relative_path_holds_elsewhere(
    world: World, iso: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    assert run(world, "create", "web", "--iso", Path(iso).name) == 0
    assert world.vms.load("web").spec.iso == iso
    assert run(world, "set", "web", "--iso", "none") == 0
    assert world.vms.load("web").spec.iso is None
    assert run(world, "set", "web", "--iso", Path(iso).name) == 0
    assert world.vms.load("web").spec.iso == iso
    assert run(world, "set", "web", "--iso", "gone.iso") == 1
    assert world.vms.load("web").spec.iso == iso


def test_info_has_it(world: World, iso: str, capsys: pytest.CaptureFixture[str]) -> None:
    world.vm("web", iso=iso)
    run(world, "info", "web")
    assert f"iso        {iso}\n" in capsys.readouterr().out


def test_the_doctor_looks_at_it(world: World, iso: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda named: (None, []))
    world.vm("web", iso=iso)
    world.vm("db", iso="/nonexistent")
    world.vm("none")
    found = {
        name: [
            each for each in machine.check_machine(world.vms, name, None) if each.subject == "iso"
        ]
        for name in ("web", "db", "none")
    }
    assert [(each.level, each.mend) for each in found["web"]] == [("ok", None)]
    assert [(each.level, each.mend) for each in found["db"]] == [
        ("problem", "without it: drivebay vm eject db")
    ]
    assert found["none"] == []


# ---- eject --------------------------------------------------------------------------------------


def test_a_vm_that_is_off_loses_it_from_its_file(
    world: World, iso: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.vm("web", iso=iso)
    assert run(world, "eject", "web", "--dry-run") == 0
    assert capsys.readouterr().out == "would strike it from vm.toml of VM 'web'\n"
    assert world.vms.load("web").spec.iso == iso
    assert run(world, "eject", "web") == 0
    assert world.vms.load("web").spec.iso is None
    assert run(world, "eject", "web") == 1
    assert "VM 'web' has no CD" in capsys.readouterr().err


def test_a_running_one_loses_it_at_once(
    world: World, running: FakeMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, "eject", "web", "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert asked(running) == []
    assert run(world, "eject", "web") == 0
    assert asked(running) == [EJECT, LET_GO]
    assert world.vms.load("web").spec.iso is None
    capsys.readouterr()
    assert run(world, "info", "web") == 0
    assert "waits for a restart" not in capsys.readouterr().out
    assert run(world, "eject", "web") == 1  # it is noted that the machine has none any more


def test_one_that_is_to_lose_it_at_its_next_start_loses_it_now(
    world: World, running: FakeMonitor
) -> None:
    assert run(world, "set", "web", "--iso", "none") == 0
    assert run(world, "eject", "web") == 0
    assert asked(running) == [EJECT, LET_GO]


def test_one_that_is_to_get_it_at_its_next_start_never_gets_it(world: World, iso: str) -> None:
    with idle_process() as process:
        for monitor in runs(world.vm("web"), process):
            assert run(world, "set", "web", "--iso", iso) == 0
            assert run(world, "eject", "web") == 0
            assert asked(monitor) == []
    assert world.vms.load("web").spec.iso is None


def test_a_guest_that_holds_it_fast_keeps_it(
    world: World, running: FakeMonitor, iso: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cd, "LETTING_GO_SECONDS", 0.0)
    running.answers["eject"] = LOCKED
    assert run(world, "eject", "web") == 1
    said = capsys.readouterr().err
    assert "the guest of VM 'web' did not let go of its CD" in said
    assert "unmount it there" in said
    assert EJECT in asked(running)
    assert LET_GO not in asked(running)
    assert world.vms.load("web").spec.iso == iso


def test_a_guest_that_is_asked_may_open_the_tray(
    world: World, running: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cd, "_TRY_EVERY_S", 0.0)
    answers = iter([LOCKED, LOCKED, {}])
    running.answers["eject"] = lambda arguments: next(answers)
    assert run(world, "eject", "web") == 0
    assert asked(running) == [EJECT, EJECT, EJECT, LET_GO]


# ---- start --------------------------------------------------------------------------------------


def test_after_a_start_from_it_the_disk_is_first_again(world: World, running: FakeMonitor) -> None:
    cd.start_last(world.vms.load("web"))
    told = {"path": "/machine/peripheral/cd", "property": "bootindex", "value": 2}
    assert asked(running) == [("qom-set", told)]
    running.answers["qom-set"] = Refuses("no")
    cd.start_last(world.vms.load("web"))  # and the machine runs on


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text"], "--text starts the installer of an ISO"),
        (["--text", "--iso", "none"], "--text starts the installer of an ISO"),
        (["--text", "--iso", "ISO", "--kernel", "/k"], "and --kernel another one"),
        (["--text", "--iso", "ISO", "--wait"], "one of the two"),
        (["--text", "--iso", "ISO"], "has no installer's kernel"),
        (["--text", "--iso", "/nonexistent"], "can't read the ISO"),
    ],
)
def test_a_text_that_cannot_be_makes_no_vm(
    world: World, iso: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [iso if word == "ISO" else word for word in words]
    assert run(world, "create", "web", "--image", "none", *told) in (1, 2)
    assert said in capsys.readouterr().err
    assert (world.vms.names(), world.volumes()) == ([], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "--wait"], "one of the two"),
        (["--text"], "has no installer's kernel"),
        (["--text", "--boot", "iso"], "has no installer's kernel"),
    ],
)
def test_what_could_not_start_again_is_not_stopped(
    world: World, running: FakeMonitor, words: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(world, "restart", "web", *words) in (1, 2)
    assert said in capsys.readouterr().err
    assert asked(running) == []
    assert run(world, "set", "web", "--iso", "none") == 0
    assert run(world, "restart", "web", "--boot", "iso") == 2
    assert "VM 'web' has no ISO to start from" in capsys.readouterr().err
    assert asked(running) == []


def test_there_is_nothing_else_to_start_from(
    world: World, iso: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.vm("web", iso=iso)
    for command in ("start", "restart"):
        assert run(world, command, "web", "--boot", "net") == 2
        assert "'net'" in capsys.readouterr().err
