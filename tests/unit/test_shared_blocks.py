"""Requests of many buffers borrow from a store that all queues of a reactor share."""

from __future__ import annotations

from drivebay.bdev.base import Channel
from tests.fakes.driver import BlkDriver, Framing, Kind, Status
from tests.fakes.stepped import Machine, malloc_bdev

BLOCKS = 256
MANY = Framing((16, *[512] * 8), indirect=True)  # nine buffers of data: one more than fit inline
DATA = bytes(9 * 512)


def send(disk: BlkDriver, count: int) -> None:
    for _ in range(count):
        disk.queue(Kind.OUT, 0, DATA, framing=MANY)
    disk.publish()
    disk.port.kick()


def let_one_round_pass(machine: Machine, channel: Channel) -> None:
    """What the disk holds completes, and it holds again before the next turn takes more."""
    answers = [channel.ungate(), channel.gate()]
    machine.step()
    assert all(answer.done for answer in answers)


def test_no_queue_waits_for_a_block_while_another_gets_one_again_and_again() -> None:
    with Machine() as machine:
        modest, greedy = machine.add_queue(64), machine.add_queue(64)
        disk = machine.channel
        machine.channel = malloc_bdev().open_channel(machine.reactor)
        machine.settle(machine.channel.activate())
        holder = machine.add_queue(256)
        machine.settle(disk.gate())
        machine.settle(machine.channel.gate())
        send(holder, BLOCKS - 1)
        machine.step(BLOCKS // 16)
        assert machine.queues[2].counters().inflight == BLOCKS - 1
        send(modest, 1)
        send(greedy, 2)  # woken last, so it is polled first
        machine.step()
        for _ in range(4):
            let_one_round_pass(machine, disk)
            greedy.collect()
            send(greedy, 1)
        (served,) = modest.collect()
        assert served.completion is not None
        assert served.completion.status == Status.OK
        machine.settle(machine.channel.ungate())
        machine.settle(disk.ungate())
        machine.settle(machine.queues[2].stop())
        machine.settle(machine.channel.close())
        machine.channel = disk
