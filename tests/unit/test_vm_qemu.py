"""vm/qemu.py: which QEMU there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import NotFound
from drivebay.vm.qemu import Qemu, find_qemu


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
