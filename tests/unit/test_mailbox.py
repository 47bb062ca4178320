"""Messages to reactors and their answers, as control sees them."""

from __future__ import annotations

import asyncio
import select
import sys
import threading

import pytest

from drivebay.errors import StateError
from drivebay.reactor.mailbox import Answer
from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.stepped import Machine
from tests.fakes.threaded import ThreadedMachine


def test_an_answer_is_not_there_before_the_reactor_gave_it() -> None:
    with Machine() as machine:
        answer = machine.channel.gate()
        assert not answer.done
        with pytest.raises(StateError, match="not answered yet"):
            answer.result()
        machine.reactor.step(machine.now)
        assert not answer.done, "answers are delivered by drain(), in control's thread"
        assert machine.control.drain() == 1
        assert answer.done
        assert answer.result() == 0
        machine.settle(machine.channel.ungate())


def test_messages_are_acted_on_in_the_order_they_were_sent() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        for last, completed in ((machine.channel.ungate, 1), (machine.channel.gate, 0)):
            other = machine.channel.gate if completed else machine.channel.ungate
            for _ in range(5):
                other()
                last()
            machine.step()
            pending = disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(20)
            assert len(disk.collect()) == completed
            assert (pending.completion is not None) == bool(completed)
        machine.settle(machine.channel.ungate())
        disk.wait_all()


def test_many_messages_fit_and_all_are_answered() -> None:
    """A message is its sender's memory: no mailbox can overflow."""
    with Machine() as machine:
        answers = [machine.channel.ungate() for _ in range(10_000)]
        machine.step()
        assert all(answer.done for answer in answers)


def test_an_answer_that_nobody_waits_for_leaves_nothing() -> None:
    with Machine() as machine:
        before = sys.getrefcount(machine.channel)
        for _ in range(1000):
            machine.channel.ungate()
        machine.step()
        after = sys.getrefcount(machine.channel)
        assert after == before
        kept = machine.channel.ungate()
        machine.step()
        held = sys.getrefcount(kept)
        assert held == 2, "the variable and the call"


def test_answers_are_awaited_in_asyncio() -> None:
    """By several at once; one that gives up waiting takes it from nobody."""

    async def wait(machine: ThreadedMachine) -> list[int]:
        loop = asyncio.get_running_loop()
        loop.add_reader(machine.control.fileno(), machine.control.drain)
        try:
            async with asyncio.timeout(30):
                answer = machine.channel.gate()
                impatient = asyncio.ensure_future(until_there(answer))
                patient = [asyncio.ensure_future(until_there(answer)) for _ in range(3)]
                await asyncio.sleep(0)
                impatient.cancel()
                results = list(await asyncio.gather(*patient))
                assert impatient.cancelled()
                results.append(await answer)
                results.append(await machine.channel.ungate())
                return results
        finally:
            loop.remove_reader(machine.control.fileno())

    with ThreadedMachine() as machine:
        machine.step()
        assert asyncio.run(wait(machine)) == [0] * 5


async def until_there(answer: Answer) -> int:
    return await answer


def test_many_threads_may_post_to_a_running_reactor() -> None:
    each = 2000
    with ThreadedMachine() as machine:
        machine.step()
        answers: list[list[Answer]] = [[] for _ in range(4)]

        def post(into: list[Answer]) -> None:
            into.extend(machine.channel.ungate() for _ in range(each))

        threads = [threading.Thread(target=post, args=(into,)) for into in answers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            machine.step()
        machine.until(
            lambda: all(answer.done for into in answers for answer in into), "all answers"
        )
        assert [len(into) for into in answers] == [each] * 4
        assert machine.control.drain() == 0


def break_ring(disk: BlkDriver) -> None:
    ring = disk.ring
    ring.poke_avail_idx(ring.avail_idx + ring.size + 1)


def test_an_event_is_told_once_whatever_the_guest_does_afterwards() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        break_ring(disk)
        machine.step()
        assert machine.broken == [machine.queues[0]]
        for value in range(100):
            disk.ring.poke_avail_idx(value * 641)
            machine.ports[0].kick()
            machine.step()
        assert machine.broken == [machine.queues[0]]


def test_events_of_many_queues_are_told_in_one_go_each_to_its_own() -> None:
    with Machine() as machine:
        drivers = [machine.add_queue(4) for _ in range(50)]
        for disk in drivers[::2]:
            break_ring(disk)
            disk.port.kick()
        machine.reactor.step(machine.now)
        assert machine.broken == []
        assert machine.control.drain() == 25
        assert sorted(q.index for q in machine.broken) == list(range(0, 50, 2))


def test_a_listener_that_fails_takes_no_answer_from_others() -> None:
    """Whoever waits for an answer that was lost would wait for ever."""

    class Failing(list[object]):
        def append(self, queue: object) -> None:
            super().append(queue)
            raise RuntimeError("the listener failed")

    with Machine() as machine:
        machine.broken = heard = Failing()  # type: ignore[assignment]
        for disk in (machine.add_queue(), machine.add_queue()):
            break_ring(disk)
        answer = machine.channel.ungate()
        machine.reactor.step(machine.now)
        with pytest.raises(RuntimeError, match="the listener failed"):
            machine.control.drain()
        assert answer.done
        assert len(heard) == 2


def test_the_doorbell_rings_for_an_answer_once_control_has_slept() -> None:
    with Machine() as machine:
        machine.control.drain()
        assert not select.select([machine.control.fileno()], [], [], 0)[0]
        machine.channel.ungate()
        machine.reactor.step(machine.now)
        assert select.select([machine.control.fileno()], [], [], 0)[0]
        machine.control.drain()
        assert not select.select([machine.control.fileno()], [], [], 0)[0]
