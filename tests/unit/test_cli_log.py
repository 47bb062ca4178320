"""The target's log: which lines are shown, and that nobody can forge one."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from drivebay.errors import NotFound, UsageError
from drivebay.target.log import LEVELS, Log


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Log, io.StringIO]]:
    """A started log that writes into a string; the process's own logging is as before after it."""
    root = logging.getLogger()
    before = list(root.handlers)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    log = Log()
    log.start()
    log.enable_timestamps(False)
    yield log, stream
    log.set_flag("all", False)
    for handler in list(root.handlers):
        if handler not in before:
            root.removeHandler(handler)


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_severities_have_spdks_names(written: tuple[Log, io.StringIO]) -> None:
    logger = logging.getLogger("drivebay.vhost.session")
    logger.error("e")
    logger.warning("w")
    logger.info("n")
    logger.debug("not shown: its flag is off")
    assert lines(written[1]) == [
        "ERROR vhost.session: e",
        "WARNING vhost.session: w",
        "NOTICE vhost.session: n",
    ]


def test_a_flag_shows_the_details_of_its_part_only(written: tuple[Log, io.StringIO]) -> None:
    log, stream = written
    log.set_flag("vhost", True)
    logging.getLogger("drivebay.vhost.session").debug("shown")
    logging.getLogger("drivebay.rpc.server").debug("not shown")
    log.set_flag("vhost", False)
    logging.getLogger("drivebay.vhost.session").debug("not shown any more")
    assert lines(stream) == ["INFO vhost.session: shown"]
    assert log.flags()["vhost"] is False


@pytest.mark.parametrize("name", LEVELS)
def test_the_print_level_is_a_threshold(name: str, written: tuple[Log, io.StringIO]) -> None:
    log, stream = written
    log.set_flag("target", True)
    log.set_print_level(name)
    assert log.print_level == name
    logger = logging.getLogger("drivebay.target")
    for level in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, 5):
        logger.log(level, "x")
    shown = [line.split()[0] for line in lines(stream)]
    assert shown == list(LEVELS[: LEVELS.index(name) + 1])


def test_a_line_can_not_be_forged(written: tuple[Log, io.StringIO]) -> None:
    name = "disk\nERROR target: all is lost\x1b[2J\u2028\x9b\\x0a"
    logging.getLogger("drivebay.vhost").warning("no bdev '%s'", name)
    assert lines(written[1]) == [
        r"WARNING vhost: no bdev 'disk\x0aERROR target: all is lost\x1b[2J\u2028\x9b\\x0a'"
    ]


def test_timestamps_carry_the_time_zone(written: tuple[Log, io.StringIO]) -> None:
    log, stream = written
    log.enable_timestamps(True)
    logging.getLogger("drivebay.target").info("x")
    stamp, rest = lines(stream)[0].split(" ", 1)
    assert rest == "NOTICE target: x"
    assert len(stamp) == len("2026-01-02T03:04:05.678+0000")


def test_libraries_are_shown_too(written: tuple[Log, io.StringIO]) -> None:
    logging.getLogger("asyncio").error("x")
    assert lines(written[1]) == ["ERROR asyncio: x"]


def test_options_of_the_command_line() -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        log = Log()
        log.start(("bdev", "rpc"), silence_notice=True)
        assert [flag for flag, on in log.flags().items() if on] == ["bdev", "rpc"]
        assert log.print_level == "WARNING"
        assert log.level == "NOTICE"
        log.set_level("ERROR")
        assert log.level == "ERROR"
        log.set_flag("all", False)
    finally:
        for handler in list(root.handlers):
            if handler not in before:
                root.removeHandler(handler)


def test_unknown_names_are_refused() -> None:
    log = Log()
    with pytest.raises(NotFound, match="no log flag 'nosuch'") as caught:
        log.set_flag("nosuch", True)
    assert "vhost_blk" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no log level 'notice'"):
        log.set_print_level("notice")
    with pytest.raises(UsageError, match="no log level ''"):
        log.set_level("")


def test_the_last_lines_are_kept_whatever_is_shown(written: tuple[Log, io.StringIO]) -> None:
    log, stream = written
    log.set_print_level("ERROR")
    logger = logging.getLogger("drivebay.vhost.session")
    for number in range(2100):
        logger.info("line %d", number)
    logger.info("x" * 9000)
    assert lines(stream) == []
    recent = log.recent()
    assert len(recent) == 2000
    assert recent[0].endswith("NOTICE vhost.session: line 101")
    assert len(recent[-1]) == 2000
