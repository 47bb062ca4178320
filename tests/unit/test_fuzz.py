"""The fuzzers themselves: they repeat, they see what is wrong, and a failure's input is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.vhost.descriptors import Received
from fuzz.choices import Choices
from fuzz.explorer import CurrentInput, Explorer, corpus_of
from fuzz.guest import LAYOUTS, Guest
from fuzz.messages import Messages
from fuzz.rings import Life, Rings


class Recorder:
    """A target that keeps its inputs, and fails on one that begins with ``bad``."""

    name = "recorder"

    def __init__(self, bad: int = -1) -> None:
        self.inputs: list[bytes] = []
        self.bad = bad

    def run(self, data: bytes) -> frozenset[str]:
        self.inputs.append(data)
        assert data[:1] != bytes([self.bad & 0xFF]) or self.bad < 0
        return frozenset({f"length {len(data)}"})

    def close(self) -> None:
        pass


def explored(folder: Path, seed: int) -> list[bytes]:
    recorder = Recorder()
    Explorer(recorder, seed, folder / "current").explore(60, inputs=50)
    return recorder.inputs


def test_the_same_seed_tries_the_same(tmp_path: Path) -> None:
    assert explored(tmp_path, 1) == explored(tmp_path, 1)
    assert explored(tmp_path, 1) != explored(tmp_path, 2)


def test_the_input_that_failed_is_at_hand(tmp_path: Path) -> None:
    recorder = Recorder(bad=7)
    explorer = Explorer(recorder, 0, tmp_path / "current")
    with pytest.raises(AssertionError):
        explorer.replay([b"\1good", b"\7bad", b"\2later"])
    assert CurrentInput.read(tmp_path / "current") == b"\7bad"


def test_decisions_behind_the_end_are_the_usual_ones() -> None:
    choices = Choices(b"\5\6")
    assert choices.below(10) == 5
    assert choices.pick("abcdefgh") == "g"
    assert choices.left == 0
    assert (choices.below(1000), choices.pick("xy"), choices.rarely(2)) == (0, "x", False)
    assert choices.raw(3) == bytes(3)


@pytest.mark.parametrize("pieces", LAYOUTS)
def test_a_changed_byte_is_seen_unless_it_was_given(pieces: tuple[object, ...]) -> None:
    guest = Guest()
    guest.reset(LAYOUTS[LAYOUTS.index(pieces)])
    before = guest.snapshot()
    first = guest.pieces[0]
    guest.bytes[first.offset + 5] ^= 1
    guest.bytes[first.offset - 1] ^= 1
    changed = guest.changed_outside(bytearray(before), guest.all_of_it())
    assert changed == [first.offset - 1]
    assert guest.changed_outside(bytearray(before), [(first.guest_addr + 5, 1)]) == changed
    assert len(guest.changed_outside(bytearray(before), [])) == 2
    guest.close()


@pytest.mark.parametrize("name", ["rings", "messages"])
def test_there_is_a_corpus(name: str) -> None:
    assert len(corpus_of(name)) > 10


@pytest.fixture
def rings() -> Iterator[Rings]:
    target = Rings()
    yield target
    target.close()


def test_a_device_that_writes_elsewhere_is_noticed(
    rings: Rings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rings.run(b"")
    lives: list[Life] = []

    def spoil(life: Life) -> None:
        lives.append(life)
        life.given = []
        life.guest.bytes[0] ^= 1

    monkeypatch.setattr(Life, "give", spoil)
    with pytest.raises(AssertionError, match="the device was not given"):
        rings.run(b"")
    lives[0].machine.settle(lives[0].queue.stop())


def test_a_descriptor_that_stays_open_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Messages()
    assert target.run(b"")
    kept: list[int] = []

    def keep(received: Received, wanted: int) -> int:
        if wanted == 0:  # the message is over
            kept.extend(received.borrow())
        return 0

    monkeypatch.setattr(Received, "close_surplus", keep)
    with pytest.raises(AssertionError, match="descriptors were left behind"):
        target.run(b"")
    monkeypatch.undo()
    for fd in set(kept):
        os.close(fd)
    target.close()
