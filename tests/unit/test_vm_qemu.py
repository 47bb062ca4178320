"""vm/qemu.py: one command line, with the words that this version of QEMU knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import NotFound, UsageError
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Disk, MachineFiles, MachineSpec, Qemu, command_line, find_qemu

FILES = MachineFiles(Path("/k"), Path("/i"), Path("/console"), Path("/commands"), Path("/monitor"))
TCG = Accelerator("tcg", "")


def words(version: tuple[int, int], spec: MachineSpec) -> list[str]:
    return command_line(Qemu(Path("/qemu"), version), TCG, spec, FILES, 7)


def after(line: list[str], option: str) -> list[str]:
    return [line[at + 1] for at, word in enumerate(line) if word == option]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((7, 2), "reconnect=1"),
        ((9, 1), "reconnect=1"),
        ((9, 2), "reconnect-ms=1000"),
        ((11, 1), "reconnect-ms=1000"),
    ],
)
def test_reconnection_is_asked_for_in_the_versions_words(
    version: tuple[int, int], expected: str
) -> None:
    line = words(version, MachineSpec([Disk(Path("/run/disk"))]))
    assert f"socket,id=disk0,path=/run/disk,{expected}" in after(line, "-chardev")


def test_memory_is_one_shared_memfd_of_the_machines_size() -> None:
    line = words((9, 0), MachineSpec([], memory_mib=384))
    assert after(line, "-object") == ["memory-backend-memfd,id=memory,size=384M,share=on"]
    assert after(line, "-m") == ["384M"]
    assert after(line, "-machine") == ["q35,memory-backend=memory"]


def test_each_disk_has_its_socket_its_queues_and_no_legacy_interface() -> None:
    line = words((7, 2), MachineSpec([Disk(Path("/a,b"), 3), Disk(Path("/c"), packed=True)]))
    assert after(line, "-device") == [
        "vhost-user-blk-pci,id=vd0,chardev=disk0,disable-legacy=on,num-queues=3",
        "vhost-user-blk-pci,id=vd1,chardev=disk1,disable-legacy=on,num-queues=1,packed=on",
    ]
    assert "socket,id=disk0,path=/a,,b,reconnect=1" in after(line, "-chardev")


def test_where_emulation_forgets_writes_memory_is_no_multiple_of_64_pages() -> None:
    line = words((8, 2), MachineSpec([], memory_mib=1))
    assert after(line, "-object") == ["memory-backend-memfd,id=memory,size=1032K,share=on"]
    assert after(line, "-m") == ["1032K"]
    kvm = Accelerator("kvm", "")
    line = command_line(Qemu(Path("/qemu"), (7, 2)), kvm, MachineSpec([]), FILES, 7)
    assert after(line, "-m") == ["256M"]


def test_only_a_machine_that_waits_for_another_starts_without_its_guest() -> None:
    waiting = words((7, 2), MachineSpec([], awaits_migration=True))
    assert after(waiting, "-incoming") == ["defer"]
    assert after(words((7, 2), MachineSpec([])), "-incoming") == []
    assert after(waiting, "-qmp") == ["unix:/monitor,server=on,wait=off"]


def test_a_socket_path_that_the_kernel_would_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="has 109 bytes, the kernel takes at most 107"):
        words((7, 2), MachineSpec([Disk(Path("/" + "x" * 108))]))


def stand_in(folder: Path, text: str) -> Path:
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_version_is_asked_once_per_binary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    asked = tmp_path / "asked"
    path = stand_in(tmp_path, f"echo x >> {asked}; echo 'QEMU emulator version 9.2.1 (Debian)'")
    assert find_qemu() == find_qemu() == Qemu(path, (9, 2))
    assert asked.read_text() == "x\n"
    path = stand_in(tmp_path, "echo 'QEMU emulator version 10.0.3'")
    assert find_qemu() == Qemu(path, (10, 0))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("echo hello", "names no version: 'hello"), ("exit 1", "names no version: ''")],
)
def test_a_binary_that_is_not_qemu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    stand_in(tmp_path, text)
    with pytest.raises(NotFound, match=complaint):
        find_qemu()


def test_no_qemu_comes_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="qemu-system-x86_64 is not installed") as caught:
        find_qemu()
    assert "apt-get install" in str(caught.value.hint)
