"""Limits on a reactor with a thread of its own: set and cleared all the time, nothing is lost."""

from __future__ import annotations

import random
import time

from tests.fakes.driver import Kind, Status
from tests.fakes.stepped import malloc_bdev
from tests.fakes.threaded import ThreadedMachine

MIB = 1 << 20
RATES = (
    (0, 0, 0, 0),
    (1000, 0, 0, 0),
    (50_000, 0, 0, 0),
    (0, 20 * MIB, 0, 0),
    (0, 0, 5 * MIB, 30 * MIB),
)
DEPTH = 24
SECONDS = 1.5


def test_no_request_is_lost_while_limits_change() -> None:
    chance = random.Random(7)
    bdev = malloc_bdev(size_bytes=4 * MIB)
    with ThreadedMachine(bdev) as machine:
        disk = machine.add_queue(128)
        sent = done = 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or disk.pending:
            while len(disk.pending) < DEPTH and time.monotonic() < end:
                size = chance.choice((512, 4096, 65536))
                if chance.random() < 0.5:
                    disk.queue(Kind.IN, 0, room=size)
                else:
                    disk.queue(Kind.OUT, 0, bytes(size))
                sent += 1
            disk.publish()
            if chance.random() < 0.1:
                rates = RATES[0] if time.monotonic() > end else chance.choice(RATES)
                for answer in bdev.limit(rates):
                    machine.settle(answer)
            if chance.random() < 0.05:
                machine.settle(machine.channel.gate())
                machine.settle(machine.channel.ungate())
            for pending in disk.collect():
                assert pending.completion is not None
                assert pending.completion.status == Status.OK
                done += 1
            time.sleep(0.0005)
        assert done == sent > 200
        counted = bdev.iostat()
        assert counted["read"].ops + counted["write"].ops == sent
        assert bdev.queue_depth == 0
