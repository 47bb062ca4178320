"""The encrypted disk: what lies on its base, what is read back, and who waits for whom."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from drivebay.bdev.base import Bdev
from drivebay.bdev.crypto import CryptoBdev, CryptoKey
from drivebay.bdev.file import FileBdev
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.null import NullBdev
from drivebay.errors import UsageError
from tests.fakes.driver import Framing, Kind, Status
from tests.fakes.stepped import Machine, malloc_bdev
from tests.fakes.xts import encrypt

MIB = 1 << 20
KEY = "00112233445566778899aabbccddeeff"
KEY2 = "ffeeddccbbaa99887766554433221100"
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "xts_vectors.json").read_text())
NOISE = random.Random(20).randbytes(4 * MIB)


def crypto(base: Bdev, key: str = KEY, key2: str = KEY2) -> CryptoBdev:
    return CryptoBdev("C0", None, base, CryptoKey("k", key, key2))


def stored(base: Bdev, sector: int, length: int) -> bytes:
    """What the base itself holds."""
    with Machine(base) as machine:
        return machine.add_queue().read(sector, length)


def sealed(data: bytes, first: int = 0, block_size: int = 512) -> bytes:
    return encrypt(bytes.fromhex(KEY + KEY2), first, data, block_size)


class KeptMalloc(MallocBdev):
    """Lives on when the machine on it ends."""

    def close(self) -> None:
        """Not yet."""


def kept_malloc(size_bytes: int = MIB, block_size: int = 512) -> MallocBdev:
    return KeptMalloc("M0", None, block_size, size_bytes // block_size)


@pytest.mark.parametrize("known", VECTORS["vectors"], ids=lambda known: f"vector{known['vector']}")
def test_ieee_1619_vectors(known: dict[str, Any]) -> None:
    base = kept_malloc(64 * MIB if known["unit"] > 2000 else MIB)
    plain = bytes.fromhex(known["plain"])
    with Machine(crypto(base, known["key"], known["key2"])) as machine:
        disk = machine.add_queue()
        disk.write(known["unit"], plain)
        assert disk.read(known["unit"], 512) == plain
    assert stored(base, known["unit"], 512).hex() == known["cipher"]


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
def test_a_data_unit_is_a_block_of_the_base(block_size: int) -> None:
    base = kept_malloc(MIB, block_size)
    data = NOISE[: 3 * 65536]
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue()
        disk.write(2 * 65536 // 512, data)
        assert disk.read(2 * 65536 // 512, len(data)) == data
    assert stored(base, 2 * 65536 // 512, len(data)) == sealed(
        data, 2 * 65536 // block_size, block_size
    )


@pytest.mark.parametrize(
    "cuts", [(1,), (511, 1, 512, 513, 100), (7, 0x1001, 3), (512, 1024)], ids=str
)
def test_blocks_that_lie_across_buffers(cuts: tuple[int, ...]) -> None:
    base = kept_malloc()
    data = NOISE[:8192]
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue(64)
        disk.write(5, data, Framing(readable=(16, *cuts)))
        assert disk.read(5, 8192, Framing(writable=cuts)) == data
    assert stored(base, 5, 8192) == sealed(data, 5)


def test_a_write_leaves_the_guests_buffer_as_it_is() -> None:
    with Machine(crypto(malloc_bdev())) as machine:
        disk = machine.add_queue()
        pending = disk.queue(Kind.OUT, 0, NOISE[:4096])
        disk.publish()
        assert disk.memory.read(pending.readable[1].addr, 4096) == NOISE[:4096]
        machine.step(50)
        assert disk.memory.read(pending.readable[1].addr, 4096) == NOISE[:4096]
        assert disk.wait(pending).status == Status.OK


def test_longer_than_a_buffer_and_than_a_turn() -> None:
    base = kept_malloc(8 * MIB)
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue()
        disk.write(3, NOISE)
        assert disk.read(3, len(NOISE)) == NOISE
    assert stored(base, 3, len(NOISE)) == sealed(NOISE, 3)


def test_no_turn_takes_more_than_its_share_and_nobody_is_forgotten() -> None:
    """The base answers at once, so all the time there is goes to the cipher."""
    base = NullBdev("N0", None, 512, 65536)
    with Machine(crypto(base)) as machine:
        first, second = machine.add_queue(), machine.add_queue()
        long = first.queue(Kind.OUT, 0, NOISE)
        first.publish()
        machine.step()
        short = second.queue(Kind.OUT, 20000, NOISE[:512])
        second.publish()
        turns = 0
        while long.completion is None:
            machine.step()
            first.collect()
            second.collect()
            turns += 1
        assert turns >= 7
        assert short.completion is not None


def test_more_writes_than_buffers_wait_and_all_come_back() -> None:
    base = kept_malloc(2 * MIB)
    with Machine(crypto(base)) as machine:
        disks = [machine.add_queue(512) for _ in range(2)]
        for number, disk in enumerate(disks):
            for i in range(100):
                at = (number * 100 + i) * 4096
                disk.queue(Kind.OUT, at // 512, NOISE[at : at + 4096])
            disk.publish()
        for disk in disks:
            disk.wait_all()
        assert disks[0].read(0, 200 * 4096) == NOISE[: 200 * 4096]
    assert stored(base, 0, 200 * 4096) == sealed(NOISE[: 200 * 4096])


def test_cleared_blocks_read_as_zeroes_and_lie_encrypted_on_the_base() -> None:
    base = kept_malloc(8 * MIB)
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue()
        disk.write(0, NOISE)
        disk.write_zeroes(8, 4096, unmap=True)
        disk.write_zeroes(5000, 1)
        assert disk.read(0, 8 * 512) == NOISE[: 8 * 512]
        assert disk.read(8, 4096 * 512) == bytes(4096 * 512)
        assert disk.read(5000, 1024) == bytes(512) + NOISE[5001 * 512 : 5002 * 512]
    assert stored(base, 8, 4096 * 512) == sealed(bytes(4096 * 512), 8)


def test_discard_and_flush_go_to_the_base() -> None:
    base = kept_malloc()
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue()
        disk.write(0, NOISE[:65536])
        disk.flush()
        disk.discard(0, 64)
        assert disk.read(0, 512) != bytes(512)
        counted = base.iostat()
        assert (counted["flush"].ops, counted["unmap"].bytes) == (1, 64 * 512)
    assert stored(base, 0, 64 * 512) == bytes(64 * 512)


def test_on_a_file_opened_without_the_page_cache(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    base = FileBdev("F0", None, str(image), 512)
    with Machine(crypto(base), write_through=True) as machine:
        disk = machine.add_queue(64)
        disk.write(9, NOISE[:300_032], Framing(readable=(16, 1000)))
        assert disk.read(9, 300_032, Framing(writable=(333,))) == NOISE[:300_032]
    base.close()
    assert image.read_bytes()[9 * 512 :][:300_032] == sealed(NOISE[:300_032], 9)


def test_an_error_of_the_base_is_the_guests() -> None:
    base = malloc_bdev()
    with Machine(crypto(base)) as machine:
        disk = machine.add_queue()
        machine.settle(machine._below[0].remove())
        assert disk.request(Kind.IN, 0, room=4096).status == Status.IOERR
        assert disk.request(Kind.OUT, 0, NOISE[:4096]).status == Status.IOERR
        assert disk.request(Kind.OUT, 0, NOISE[: 3 * 131072]).status == Status.IOERR


def test_another_key_reads_something_else() -> None:
    base = kept_malloc()
    with Machine(crypto(base)) as machine:
        machine.add_queue().write(0, NOISE[:4096])
    with Machine(crypto(base, KEY2, KEY)) as machine:
        assert machine.add_queue().read(0, 4096) != NOISE[:4096]


@pytest.mark.parametrize(
    ("key", "key2", "words"),
    [
        ("", "", "0 hexadecimal digits"),
        (KEY[:-1], KEY2, "31 hexadecimal digits"),
        (KEY, KEY2 * 2, "the second key has 64"),
        ("zz" + KEY[2:], KEY2, "not made of hexadecimal digits"),
        ("\u0660" * 32, KEY2, "not made of hexadecimal digits"),
        (KEY, KEY, "the same"),
        (KEY.upper(), KEY, "the same"),
    ],
)
def test_keys_that_are_refused(key: str, key2: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        CryptoKey("k", key, key2)
    assert KEY not in str(caught.value)


def test_a_key_shows_nothing_of_itself() -> None:
    key = CryptoKey("k", KEY.upper() * 2, KEY2 * 2)
    assert repr(key) == str(key) == "<CryptoKey 'k'>"
    assert (key.bits, key.digits()) == (256, (KEY * 2, KEY2 * 2))
