"""vm/logs.py: logs that grow and are turned over, and what a guest may not do to a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import HostError
from drivebay.system.terminal import harmless
from drivebay.vm.logs import new_bytes


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"plain \xc3\xbc\t\r\n", b"plain \xc3\xbc\t\r\n"),
        (b"\x1b[0;32m  OK  \x1b[0m", b"\x1b[0;32m  OK  \x1b[0m"),
        (b"a\x1b[2Jb\x1b[Hc\x1b[?1049hd\x1b[>0c\x1b[1 qe", b"abcde"),
        (b"a\x1b]0;title\x07b\x1b]52;c;aGk=\x1b\\c", b"abc"),
        (b"a\x1bP1;1|17/\x1b\\b\x1b^x\x1b\\c", b"abc"),
        (b"a\x1b(Bb\x1b7c\x1bcd", b"abcd"),
        (b"a\x1b[\x1b[31mb", b"a[\x1b[31mb"),
        (b"\x00\x07\x08\x0c\x7fa", b"a"),
        (b"\xc2\x9b2Ja\xc3\x9b", b"2Ja\xc3\x9b"),  # as UTF-8 a terminal obeys these, too
        (b"\x1b[31;38;5;7mx\x1b[31\x07", b"\x1b[31;38;5;7mx[31"),
    ],
)
def test_a_terminal_gets_text_and_colours_only(said: bytes, shown: bytes) -> None:
    assert harmless(said) == shown


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pieces = new_bytes(log)
    assert next(pieces) == b""  # not there yet
    log.write_bytes(b"one")
    assert next(pieces) == b"one"
    assert next(pieces) == b""
    with log.open("ab") as file:
        file.write(b"two")
    assert next(pieces) == b"two"


def test_nothing_is_lost_when_a_log_is_turned_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one")
    pieces = new_bytes(log)
    assert next(pieces) == b"one"
    with log.open("ab") as file:
        file.write(b" and its end")
    log.rename(tmp_path / "log.1")
    found = [next(pieces) for _ in range(3)]
    log.write_bytes(b"two")
    found += [next(pieces) for _ in range(4)]
    assert b"".join(found) == b" and its endtwo"


def test_last_words_before_a_turn_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come, and the log is turned over, while it is looked whether that happened."""
    log = tmp_path / "log"
    log.write_bytes(b"one")

    def turn_over(path: Path, descriptor: int) -> bool:
        with log.open("ab") as file:
            file.write(b", last")
        log.rename(tmp_path / "log.1")
        return True

    monkeypatch.setattr("drivebay.vm.logs._turned_over", turn_over)
    pieces = new_bytes(log)
    assert next(pieces) + next(pieces) == b"one, last"


def test_a_log_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(HostError, match="can't read .*/log'"):
        next(new_bytes(tmp_path / "log"))
