"""vm/screen.py with a monitor that is a stand-in: what QEMU is handed, and what it made of it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import AlreadyExists, DrivebayError, HostError, PeerError, StateError
from drivebay.vm.screen import connect, take_picture
from drivebay.vm.store import Vm
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process

PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    + struct.pack(">II", 720, 400)
    + b"\x08\x02\x00\x00\x00crc."
    + b"\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as idle:
        yield idle


@pytest.fixture
def vm(world: World, process: subprocess.Popen[bytes]) -> Vm:
    vm = world.vm("web")
    seem_to_run(vm, process)
    return vm


@pytest.fixture
def monitor(vm: Vm) -> Iterator[FakeMonitor]:
    """It draws PICTURE."""
    fake = FakeMonitor(vm.monitor_socket)
    fake.answers["add-fd"] = {"fdset-id": 7, "fd": 9}
    draws(fake, PICTURE)
    yield fake
    fake.close()


def draws(fake: FakeMonitor, picture: bytes) -> None:
    def draw(arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments == {"filename": "/dev/fdset/7", "format": "png"}
        os.write(fake.descriptors[-1], picture)
        return {}

    fake.answers["screendump"] = draw


def test_qemu_speaks_on_the_other_end_of_what_it_was_handed(vm: Vm, monitor: FakeMonitor) -> None:
    with connect(vm) as connection:
        name = monitor.heard[-2][1]["fdname"]
        assert monitor.heard[-2:] == [
            ("getfd", {"fdname": name}),
            ("add_client", {"protocol": "vnc", "fdname": name, "skipauth": True}),
        ]
        (theirs,) = monitor.descriptors
        os.write(theirs, b"RFB 003.008\n")
        assert connection.recv(64) == b"RFB 003.008\n"


def test_a_picture_is_written_through_a_descriptor(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path
) -> None:
    assert take_picture(vm, tmp_path / "a.png") == (720, 400)
    assert (tmp_path / "a.png").read_bytes() == PICTURE
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
    assert monitor.commands() == ["add-fd", "screendump", "remove-fd"]


def test_a_file_is_replaced_only_if_that_is_said(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(AlreadyExists, match="is there already"):
        take_picture(vm, path)
    assert path.read_text() == "mine"
    take_picture(vm, path, replace=True)
    assert path.read_bytes() == PICTURE


def test_a_file_that_appears_meanwhile_is_not_replaced(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path
) -> None:
    draw = monitor.answers["screendump"]

    def late(arguments: dict[str, Any]) -> Any:
        (tmp_path / "a.png").write_text("mine")
        return draw(arguments)

    monitor.answers["screendump"] = late
    with pytest.raises(AlreadyExists):
        take_picture(vm, tmp_path / "a.png")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.png", "mine")]


@pytest.mark.parametrize(
    "picture", [b"", PICTURE[:-1], PICTURE[1:], PICTURE[:20], b"P6 1 1 255\n..."]
)
def test_what_is_no_whole_picture_gets_no_name(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path, picture: bytes
) -> None:
    draws(monitor, picture)
    with pytest.raises(PeerError, match="wrote no whole picture"):
        take_picture(vm, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [{}, [], {"fdset-id": None}, {"fdset-id": "x"}])
def test_an_answer_without_a_number_is_refused(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path, answer: object
) -> None:
    monitor.answers["add-fd"] = answer
    with pytest.raises(PeerError, match="gave a file no number"):
        take_picture(vm, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jpg", "does not end in .png"),
        ("picture", "does not end in .png"),
        ("none/a.png", "No such file or directory"),
        ("folder.png", "Is a directory"),
    ],
)
def test_a_place_that_is_none_is_said_before_qemu_is_asked(
    vm: Vm, monitor: FakeMonitor, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DrivebayError, match=said):
        take_picture(vm, tmp_path / name, replace=True)
    assert monitor.commands() == []


def test_a_machine_without_a_screen_says_so(vm: Vm, monitor: FakeMonitor, tmp_path: Path) -> None:
    monitor.answers["screendump"] = Refuses("There is no console to take a screendump from")
    monitor.answers["add_client"] = Refuses("protocol 'vnc' is invalid")
    for show in (connect, lambda vm: take_picture(vm, tmp_path / "a.png")):
        with pytest.raises(StateError, match="VM 'web' shows no screen") as error:
            show(vm)
        assert error.value.hint is not None
        assert "vm restart web" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_vm_that_is_off_has_no_screen(world: World, tmp_path: Path) -> None:
    vm = world.vm("off")
    for show in (connect, lambda vm: take_picture(vm, tmp_path / "a.png")):
        with pytest.raises(StateError, match="VM 'off' is not running"):
            show(vm)


def test_a_folder_that_may_not_be_written_is_named(vm: Vm, monitor: FakeMonitor) -> None:
    with pytest.raises(HostError, match="can't write '/proc/a.png'"):
        take_picture(vm, Path("/proc/a.png"))
