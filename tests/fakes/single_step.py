"""A process that is run one machine instruction at a time, to look at what a kill would leave.

The child is a fork: memory that was shared before is seen by both, and everything between two
instructions of the child is a moment at which SIGKILL could come. Linux, ptrace(2).
Context: tests. Never imports drivebay.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

PTRACE_TRACEME: Final = 0
PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_O_EXITKILL: Final = 0x100000

Mark = Callable[[], None]


class Stepped:
    """``run(mark)`` in a child; each call of ``mark`` there ends one of the parts below."""

    def __init__(self, run: Callable[[Mark], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._ptrace = libc.ptrace
        self._ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._ptrace.restype = ctypes.c_long
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(run)
        self._wait()
        self._ask(PTRACE_SETOPTIONS, PTRACE_O_EXITKILL)

    def _be_child(self, run: Callable[[Mark], None]) -> None:
        code = 1
        try:
            self._ptrace(PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            run(lambda: os.kill(os.getpid(), signal.SIGSTOP))
            code = 0
        finally:
            os._exit(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            while self.pid:
                self._wait()

    def _ask(self, request: int, data: int = 0) -> None:
        if self._ptrace(request, self.pid, None, data or None) != 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request}")

    def _wait(self) -> int:
        """The signal that stopped it; 0 when it has ended."""
        _pid, status = os.waitpid(self.pid, 0)
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self.pid = 0
        self.code = os.waitstatus_to_exitcode(status)
        return 0

    def run_to_mark(self) -> None:
        """At full speed."""
        self._ask(PTRACE_CONT)
        stopped_by = self._wait()
        if stopped_by != signal.SIGSTOP:
            raise AssertionError(f"the child stopped by {stopped_by}, not at its mark")

    def instructions(self) -> Iterator[None]:
        """After each one, up to the next mark."""
        while True:
            self._ask(PTRACE_SINGLESTEP)
            stopped_by = self._wait()
            if stopped_by == signal.SIGSTOP:
                return
            if stopped_by != signal.SIGTRAP:
                raise AssertionError(f"the child stopped by {stopped_by} while it was stepped")
            yield

    def run_to_end(self) -> None:
        """At full speed; it must end well."""
        self._ask(PTRACE_CONT)
        self._wait()
        if self.pid or self.code:
            raise AssertionError("the child did not come to its end")
