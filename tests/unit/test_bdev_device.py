"""Block devices: read and written past the page cache, and cleared in whatever way they can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.bdev.file import FileBdev
from tests.fakes.driver import Framing
from tests.fakes.stepped import Machine

SIZE = 8 << 20


@pytest.fixture
def device(loop_device: Callable[..., Path]) -> Path:
    return loop_device(SIZE)


def test_a_device_goes_past_the_page_cache(device: Path) -> None:
    """Its name lies in /dev, which is a kind of tmpfs and has no O_DIRECT; the device has."""
    bdev = FileBdev("Device0", None, str(device))
    assert bdev.direct
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        disk.write(8, b"\x5a" * 4096, Framing((16, 100, 412)))
        assert disk.read(8, 4096, Framing((16,), (1000,))) == b"\x5a" * 4096


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_on_a_device_that_cannot_discard(device: Path, unmap: bool) -> None:
    """That they may be a hole is a permission: where there are no holes they are written."""
    Path(f"/sys/block/{device.name}/queue/discard_max_bytes").write_text("0")
    bdev = FileBdev("Device0", None, str(device))
    assert "unmap" not in bdev.io_types
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        disk.write(0, b"\xff" * 8192)
        disk.write_zeroes(1, 8, unmap=unmap)
        assert disk.read(0, 8192) == b"\xff" * 512 + bytes(4096) + b"\xff" * 3584
