"""The target's log: one line per event on standard error, and to syslog where there is one.

Context: control and worker threads; the data plane never logs. Everybody else
writes with ``logging.getLogger(__name__)``; this module alone decides what is
shown. SPDK's names are the vocabulary of the ``log_*`` methods and of ``-L``:

    ERROR    logging.ERROR     something failed
    WARNING  logging.WARNING   something is odd; also every misbehaving peer
    NOTICE   logging.INFO      what an operator wants to have seen
    INFO     logging.DEBUG     details of one part: shown only when its flag is on
    DEBUG    below             as INFO, in bulk (whole messages)

Two thresholds, as in SPDK: the *level* is what goes to syslog, the *print
level* what goes to standard error. The last lines are kept in memory whatever the
two say, for who asks what happened (drivebay_get_diagnostics). Text from guests,
VM monitors and clients appears in these lines, so control characters are escaped:
nobody can forge a line or steer the operator's terminal.
"""

from __future__ import annotations

import logging
import sys
import syslog
import time
from collections import deque
from pathlib import Path

from drivebay.errors import NotFound, UsageError

__all__ = ["LEVELS", "LOG", "Log"]

# SPDK's level name -> lowest record that passes.
_THRESHOLDS = {
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "NOTICE": logging.INFO,
    "INFO": logging.DEBUG,
    "DEBUG": 1,
}
LEVELS = tuple(_THRESHOLDS)

# Lines kept in memory: enough for an hour of trouble, at most 4 MB.
_KEPT_LINES = 2000
_KEPT_CHARACTERS = 2000  # of each

_PRIORITIES = {
    "ERROR": syslog.LOG_ERR,
    "WARNING": syslog.LOG_WARNING,
    "NOTICE": syslog.LOG_NOTICE,
    "INFO": syslog.LOG_INFO,
    "DEBUG": syslog.LOG_DEBUG,
}

# A flag turns on the details of one logger and of those below it.
_FLAGS = {
    "app_config": "drivebay.rpc.config",
    "bdev": "drivebay.bdev",
    "log_rpc": "drivebay.rpc.dispatch",
    "reactor": "drivebay.reactor",
    "rpc": "drivebay.rpc",
    "target": "drivebay.target",
    "vhost": "drivebay.vhost",
    "vhost_blk": "drivebay.vhost.blk",
    "vhost_ring": "drivebay.dataplane",
}

# C0 and C1 controls, DEL, the line and paragraph separators; \\ so that an escape can't be forged.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
} | {ord("\\"): "\\\\"}


def _level_name(levelno: int) -> str:
    return next((name for name, least in _THRESHOLDS.items() if levelno >= least), "DEBUG")


class _LineFormatter(logging.Formatter):
    """`2026-11-24T14:02:03.456+0000 NOTICE vhost.session: text`, on one line."""

    timestamps = True

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("drivebay.")
        text = record.getMessage().translate(_ESCAPES)
        line = f"{_level_name(record.levelno)} {name}: {text}"
        if record.exc_info:  # a fault of ours: the one event that may take several lines
            line += "\n" + self.formatException(record.exc_info)
        if not self.timestamps:
            return line
        moment = time.localtime(record.created)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", moment)
        return f"{stamp}.{int(record.msecs):03d}{time.strftime('%z', moment)} {line}"


class _SyslogHandler(logging.Handler):
    """libc's syslog: silently nothing where no daemon listens, and never waits for a connection."""

    def emit(self, record: logging.LogRecord) -> None:
        syslog.syslog(_PRIORITIES[_level_name(record.levelno)], self.format(record))


class _RecentLines(logging.Handler):
    """The last lines, always with their time."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_LineFormatter())
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record)[:_KEPT_CHARACTERS])


class Log:
    """What is shown and where; the state behind the ``log_*`` methods and ``-L``."""

    def __init__(self) -> None:
        self._formatter = _LineFormatter()
        self._printer: logging.Handler = logging.StreamHandler(sys.stderr)
        self._printer.setFormatter(self._formatter)
        self._syslog: logging.Handler | None = None
        self._recent = _RecentLines()
        self._flags = dict.fromkeys(_FLAGS, False)
        self._level = "NOTICE"
        self._print_level = "INFO"
        self.set_print_level(self._print_level)

    def start(self, flags: tuple[str, ...] = (), *, silence_notice: bool = False) -> None:
        """Begin to write. Once, when the process becomes a target.

        Raises: NotFound for a flag that does not exist.
        """
        for flag in flags:
            self.set_flag(flag, True)
        if flags:
            self.set_print_level("DEBUG")
        if silence_notice:
            self.set_print_level("WARNING")
        logging.getLogger("drivebay").setLevel(logging.INFO)
        root = logging.getLogger()
        root.addHandler(self._printer)
        root.addHandler(self._recent)
        if Path("/dev/log").exists():
            syslog.openlog("drivebay", syslog.LOG_PID, syslog.LOG_LOCAL7)
            self._syslog = _SyslogHandler()
            self._syslog.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            self.set_level(self._level)
            root.addHandler(self._syslog)

    @property
    def level(self) -> str:
        """The least severe level that goes to syslog."""
        return self._level

    def set_level(self, name: str) -> None:
        """Set what goes to syslog. Raises: UsageError for a name not in LEVELS."""
        threshold = _threshold(name)
        self._level = name
        if self._syslog is not None:
            self._syslog.setLevel(threshold)

    @property
    def print_level(self) -> str:
        """The least severe level that goes to standard error."""
        return self._print_level

    def set_print_level(self, name: str) -> None:
        """Set what goes to standard error. Raises: UsageError for a name not in LEVELS."""
        self._printer.setLevel(_threshold(name))
        self._print_level = name

    def recent(self) -> list[str]:
        """The last lines, the oldest first, whichever of them were shown."""
        return list(self._recent.lines)

    def flags(self) -> dict[str, bool]:
        """All flags, and whether each is on."""
        return dict(self._flags)

    def set_flag(self, name: str, on: bool) -> None:
        """Show or hide the details of one part; 'all' is every part. Raises: NotFound."""
        names = list(_FLAGS) if name == "all" else [name]
        for flag in names:
            if flag not in _FLAGS:
                raise NotFound(f"no log flag '{flag}'", hint=f"the flags are: {', '.join(_FLAGS)}")
            self._flags[flag] = on
            logging.getLogger(_FLAGS[flag]).setLevel(1 if on else logging.NOTSET)

    def enable_timestamps(self, enabled: bool) -> None:
        """Begin each line with the time, or not."""
        self._formatter.timestamps = enabled


def _threshold(name: str) -> int:
    if name not in _THRESHOLDS:
        raise UsageError(
            f"no log level '{name}'", field="level", hint=f"the levels are: {', '.join(LEVELS)}"
        )
    return _THRESHOLDS[name]


LOG = Log()
