"""vm/initramfs.py: modules in an order that loads, and an archive of aligned entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import NotFound
from drivebay.vm.initramfs import Archive, modules_in_loading_order, pack

HEADER_BYTES = 110


def module(tree: Path, name: str, depends: str) -> None:
    path = tree / "kernel" / f"{name}.ko"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"ELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")


def test_each_module_comes_after_what_it_needs(tmp_path: Path) -> None:
    module(tmp_path, "virtio_blk", "virtio_ring,virtio")
    module(tmp_path, "virtio", "virtio_ring")
    module(tmp_path, "virtio-pci", "virtio,virtio_pci_modern_dev,virtio_ring")
    module(tmp_path, "virtio_ring", "")
    module(tmp_path, "virtio_pci_modern_dev", "")
    names = [
        found.name for found in modules_in_loading_order(tmp_path, ["virtio_pci", "virtio_blk"])
    ]
    assert names == ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"]


def test_a_missing_dependency_is_named_with_who_wants_it(tmp_path: Path) -> None:
    module(tmp_path, "virtio_blk", "virtio")
    with pytest.raises(NotFound, match="module 'virtio', wanted by 'virtio_blk'"):
        modules_in_loading_order(tmp_path, ["virtio_blk"])


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Read a newc archive as the kernel does: name to (mode, data)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + HEADER_BYTES : at + HEADER_BYTES + name_size - 1].decode()
        data_at = (at + HEADER_BYTES + name_size + 3) & ~3
        if name == "TRAILER!!!":
            assert len(archive) % 4 == 0
            return found
        found[name] = (mode, archive[data_at : data_at + size])
        at = (data_at + size + 3) & ~3


@pytest.mark.parametrize("length", range(5))
def test_entries_of_any_length_stay_aligned(length: int) -> None:
    archive = Archive()
    archive.add_file("a" * (length + 1), b"x" * length, 0o755)
    archive.add_symlink("bin/sh", "busybox")
    found = entries(archive.finish())
    assert found["a" * (length + 1)] == (0o100755, b"x" * length)
    assert found["bin/sh"] == (0o120777, b"busybox")


def test_the_guest_gets_busybox_modules_in_order_and_its_scripts(tmp_path: Path) -> None:
    module(tmp_path, "b", "a")
    module(tmp_path, "a", "")
    ordered = modules_in_loading_order(tmp_path, ["b"])
    found = entries(pack(b"BUSY", ordered, {"/init": b"#!/bin/busybox sh\n"}))
    assert found["init"] == (0o100755, b"#!/bin/busybox sh\n")
    assert found["bin/busybox"] == (0o100755, b"BUSY")
    assert found["modules/order"][1] == b"a.ko\nb.ko\n"
    assert found["modules/a.ko"][1] == ordered[0].data
