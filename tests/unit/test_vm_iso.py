"""vm/iso.py: what can be in a CD drive, and what is said of what can't."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivebay.errors import HostError, UsageError
from drivebay.vm.iso import check_iso
from tests.unit.iso_files import write_iso

BLOCK = 2048


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    return write_iso(tmp_path / "a b,c.iso", {"/a": bytes(1 << 20)})


def test_an_iso_is_one(iso: Path, tmp_path: Path) -> None:
    check_iso(iso)
    link = tmp_path / "link"
    link.symlink_to(iso)
    check_iso(link)


def test_a_copy_may_lack_the_padding_that_writers_add_for_that(iso: Path) -> None:
    os.truncate(iso, iso.stat().st_size - 150 * BLOCK)
    check_iso(iso)
    os.truncate(iso, iso.stat().st_size - 1)
    with pytest.raises(UsageError, match="is cut off: it has 7.. KiB, and says itself") as caught:
        check_iso(iso)
    assert "download it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        (b"", "it is 0 bytes without the mark of ISO 9660", "burns to a CD"),
        (b"QFI\xfb" + bytes(40000), "it is a qcow2 disk image", "drivebay image import"),
        (b"KDMV" + bytes(100), "it is a VMDK disk image", "drivebay image import"),
        (b"\xfd7zXZ\0" + bytes(100), "it is a file compressed by xz", "burns to a CD"),
        (bytes(40960), "it is 40 KiB without the mark", "burns to a CD"),
        (bytes(16 * BLOCK) + b"\x01CD001\x01", "it is 32 KiB without the mark", "burns"),
        (bytes(16 * BLOCK) + b"\x02CD001\x01" + bytes(BLOCK), "without the mark", "burns"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, said: str, hint: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no ISO: ") as caught:
        check_iso(path)
    assert said in str(caught.value)
    assert hint in str(caught.value.hint)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is no file, and so no ISO"):
            check_iso(path)
    with pytest.raises(HostError, match="can't read the ISO '/nonexistent'"):
        check_iso(Path("/nonexistent"))
