"""A guest that holds up the data plane at the very moment when the target is told to end."""

from __future__ import annotations

import os
from pathlib import Path

from tests.fakes.driver import Kind, Session
from tests.fakes.process import TargetProcess

FULL = (1 << 64) - 2


def test_a_reactor_stuck_in_a_guests_eventfd_is_freed_during_the_end_too(tmp_path: Path) -> None:
    target = TargetProcess(tmp_path)
    try:
        target.malloc("Disk0")
        with Session(target.controller("bad", "Disk0")) as session:
            session.disk.flush()
            call = session.ports[0].call_fd
            session.ports[0].take_calls()
            os.eventfd_write(call, FULL)
            os.set_blocking(call, True)
            session.disk.queue(Kind.FLUSH)
            session.disk.publish()
            assert target.stop() == 0, target.log()
    finally:
        target.kill()
