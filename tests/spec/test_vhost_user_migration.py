"""vhost-user, "Migration": which pages are marked in the dirty log, and when.

The real data plane under a real session; the front end, its log and the driver are the
pure-Python ones of tests/fakes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fakes.dirty_log import DirtyLog, pages_of
from tests.fakes.driver import BlkDriver, Completion, Kind, Pending, Session, Status
from tests.fakes.front_end import F_LOG_ALL
from tests.fakes.memory import APART, PAGE
from tests.fakes.packed_ring import PackedRing
from tests.spec.whole_target import SECTORS, Target, serving_target

LOG_ALL = 1 << F_LOG_ALL
BLOCK = 4096
BLOCKS = SECTORS * 512 // BLOCK


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with serving_target(tmp_path) as running:
        yield running


@contextmanager
def logged_session(target: Target, *, logging: bool = True) -> Iterator[tuple[Session, DirtyLog]]:
    """A session whose rings lie below 4 GiB and whose buffers lie above, with a log."""
    with Session(target.socket) as session, DirtyLog(session.memory) as log:
        session.memory.keep_below(APART[1].guest_addr)
        log.send(session.front_end)
        if logging:
            session.front_end.set_features(session.front_end.features | LOG_ALL)
        yield session, log


def log_rings(session: Session, on: bool = True) -> None:
    """SET_VRING_ADDR with the addresses as before, and the flag as told."""
    memory, ring = session.memory, session.disk.any_ring
    session.front_end.set_vring_addr(
        0,
        memory.user_addr(ring.desc),
        memory.user_addr(ring.avail),
        memory.user_addr(ring.used),
        ring.used if on else None,
    )


def own_pages(session: Session) -> set[int]:
    """What the device writes of a ring."""
    ring = session.disk.any_ring
    if isinstance(ring, PackedRing):
        return pages_of([(ring.desc, 16 * ring.size), (ring.used, 4)])
    return pages_of([(ring.used, 6 + 8 * ring.size)])


def answered(driver: BlkDriver, pending: Pending) -> Completion:
    driver.publish()
    return driver.wait(pending)


def written_by(pending: Pending) -> set[int]:
    """All that a successful request writes: its writable buffers, the status among them."""
    return pages_of((segment.addr, segment.length) for segment in pending.writable)


@pytest.mark.parametrize(
    ("kind", "room", "data"),
    [
        (Kind.IN, 512, b""),
        (Kind.IN, 64 * 1024, b""),
        (Kind.OUT, 0, b"x" * BLOCK),
        (Kind.FLUSH, 0, b""),
        (Kind.GET_ID, 20, b""),
    ],
)
def test_all_that_a_request_writes_is_marked_and_nothing_else(
    target: Target, kind: Kind, room: int, data: bytes
) -> None:
    with logged_session(target) as (session, log):
        session.memory.allocate(PAGE + 123)  # so that nothing begins at a page
        pending = session.disk.queue(kind, 0, data, room)
        assert answered(session.disk, pending).status == Status.OK
        assert log.pages() == written_by(pending)


@pytest.mark.parametrize(
    ("kind", "sector", "status"),
    [(Kind.IN, 1 << 40, Status.IOERR), (Kind.SECURE_ERASE, 0, Status.UNSUPP)],
)
def test_a_request_that_fails_has_its_status_marked(
    target: Target, kind: Kind, sector: int, status: Status
) -> None:
    with logged_session(target) as (session, log):
        pending = session.disk.queue(kind, sector, room=512)
        assert answered(session.disk, pending).status == status
        last = pending.writable[-1]
        assert pages_of([(last.addr + last.length - 1, 1)]) <= log.pages() <= written_by(pending)


def test_each_piece_of_a_scattered_buffer_is_marked(target: Target) -> None:
    with logged_session(target) as (session, log):
        driver = session.disk
        header = driver.queue(Kind.IN, 0, room=16)  # for its readable buffer
        driver.publish()
        driver.wait(header)
        log.take()
        pieces = []
        for _ in range(12):
            pieces.append(driver._buffer(bytes(512), True))
            session.memory.allocate(PAGE)
        status = driver._buffer(b"\xee", True)
        request = driver._buffer(bytes(16), False)
        pending = driver.queue_chain([request], [*pieces, status], indirect=True)
        assert answered(driver, pending).status == Status.OK
        assert log.pages() == written_by(pending)
        assert len(log.pages()) >= 12


def test_without_log_all_nothing_is_marked(target: Target) -> None:
    with logged_session(target, logging=False) as (session, log):
        log_rings(session)
        session.disk.write(0, b"y" * BLOCK)
        session.disk.read(0, BLOCK)
        assert log.pages() == set()


def test_logging_ends_with_log_all(target: Target) -> None:
    with logged_session(target) as (session, log):
        log_rings(session)
        session.disk.read(0, BLOCK)
        assert log.take()
        front = session.front_end
        front.set_features(front.features & ~LOG_ALL)
        session.disk.read(0, BLOCK)
        assert log.pages() == set()


def test_the_ring_is_marked_while_its_flag_is_set(target: Target) -> None:
    """ "Modifications to "used" vring should be marked if VHOST_VRING_F_LOG is [set]." """
    with logged_session(target) as (session, log):
        for on in (False, True, False, True):
            log_rings(session, on)
            log.take()
            pending = session.disk.queue(Kind.IN, 0, room=BLOCK)
            answered(session.disk, pending)
            rings = log.pages() - written_by(pending)
            assert rings <= own_pages(session)
            assert bool(rings) == on


def test_switching_loses_no_request_that_is_under_way(target: Target) -> None:
    with logged_session(target, logging=False) as (session, _log):
        front, driver = session.front_end, session.disk
        plain = front.features
        for round_ in range(40):
            pending = [driver.queue(Kind.IN, 8 * n, room=BLOCK) for n in range(8)]
            driver.publish()
            front.set_features(plain | LOG_ALL if round_ % 2 else plain)
            log_rings(session, round_ % 3 == 0)
            for one in pending:
                assert driver.wait(one).status == Status.OK


def test_a_former_log_is_written_no_more_once_the_new_one_is_answered(target: Target) -> None:
    with logged_session(target) as (session, former), DirtyLog(session.memory) as log:
        driver = session.disk
        first = [driver.queue(Kind.IN, 8 * n, room=BLOCK) for n in range(12)]
        driver.publish()
        log.send(session.front_end)
        then = former.pages()
        more = [driver.queue(Kind.IN, 8 * n, room=BLOCK) for n in range(8)]
        driver.publish()
        driver.wait_all()
        assert former.pages() == then
        marked = set().union(*(written_by(one) for one in (*first, *more)))
        assert then | log.pages() == marked


class Copied:
    """Memory that is copied while it is used, as a VM monitor does it to migrate a guest.

    What the driver writes is noted here, as the monitor's own tracking of the guest's
    processors would note it; what the device writes is known from its log alone.
    """

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self.session = session
        self.memory = session.memory
        self.stack = stack
        self.driver_wrote: set[int] = set()
        self._watch_driver()
        self.log: DirtyLog | None = None
        self.next_log()
        self.copy = {region: bytearray(region.bytes) for region in self.memory.regions}

    def _watch_driver(self) -> None:
        write, store_u16 = self.memory.write, self.memory.store_u16

        def noted_write(guest_addr: int, data: bytes) -> None:
            self.driver_wrote |= pages_of([(guest_addr, len(data))])
            write(guest_addr, data)

        def noted_store(guest_addr: int, value: int) -> None:
            self.driver_wrote |= pages_of([(guest_addr, 2)])
            store_u16(guest_addr, value)

        self.memory.write = noted_write  # type: ignore[method-assign]
        self.memory.store_u16 = noted_store  # type: ignore[method-assign]

    def next_log(self) -> set[int]:
        """Replace the log; what the former one says is final when that is answered."""
        former, self.log = self.log, self.stack.enter_context(DirtyLog(self.memory))
        self.log.send(self.session.front_end)
        return former.pages() if former is not None else set()

    def pass_over(self, pages: set[int]) -> None:
        """Copy what changed since the last time."""
        changed, self.driver_wrote = pages | self.driver_wrote, set()
        for page in changed:
            region = self.memory.region_of(page * PAGE)
            at = page * PAGE - region.guest_addr
            self.copy[region][at : at + PAGE] = region.bytes[at : at + PAGE]

    def differs(self) -> list[int]:
        """Pages that would be wrong at the destination."""
        return [
            region.guest_addr // PAGE + at // PAGE
            for region, copy in self.copy.items()
            for at in range(0, region.size, PAGE)
            if copy[at : at + PAGE] != region.bytes[at : at + PAGE]
        ]


def work(copied: Copied, rng: random.Random, blocks: list[bytes], batch: int = 6) -> None:
    """Reads and writes at random places; some reads are still in flight when this returns."""
    driver = copied.session.disk
    for pending in list(driver.pending.values()):
        if rng.random() < 0.7:
            assert driver.wait(pending).status == Status.OK
    if len(driver.pending) > 10:
        driver.wait_all()
    reads = {}
    for _ in range(batch):
        block = rng.randrange(BLOCKS)
        if rng.random() < 0.3 and not any(driver.pending):
            blocks[block] = rng.randbytes(BLOCK)
            driver.write(8 * block, blocks[block])
        reads[block] = driver.queue(Kind.IN, 8 * block, room=BLOCK)
    # What the driver wrote is copied before the device writes there.
    copied.pass_over(set())
    driver.publish()
    block, read = reads.popitem()
    assert driver.wait(read).data == blocks[block]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_that_is_copied_while_it_works_arrives_whole(
    target: Target, seed: int, packed: bool
) -> None:
    """Pre-copy in 25 passes under verified I/O, then GET_VRING_BASE and the last pass."""
    rng = random.Random(seed)
    blocks = [bytes(BLOCK)] * BLOCKS
    target.run(target.controllers.create_blk("either", "M0", packed_ring=packed))
    with Session(target.directory / "either") as session, ExitStack() as stack:
        session.memory.keep_below(APART[1].guest_addr)
        driver = session.disk
        assert isinstance(driver.any_ring, PackedRing) == packed
        for block in range(0, BLOCKS, 16):
            blocks[block] = rng.randbytes(BLOCK)
            driver.write(8 * block, blocks[block])
        session.front_end.set_features(session.front_end.features | LOG_ALL)
        log_rings(session)
        copied = Copied(session, stack)
        for _ in range(25):
            work(copied, rng, blocks)
            copied.pass_over(copied.next_log())
        session.front_end.get_vring_base(0)
        assert copied.log is not None
        copied.pass_over(copied.log.pages())
        assert copied.differs() == []
        assert any(any(copy) for copy in copied.copy.values())


def test_a_page_that_is_not_copied_again_is_seen(target: Target) -> None:
    """The test above can fail."""
    with Session(target.socket) as session, ExitStack() as stack:
        session.memory.keep_below(APART[1].guest_addr)
        session.disk.write(0, b"d" * BLOCK)
        copied = Copied(session, stack)
        pending = session.disk.queue(Kind.IN, 0, room=BLOCK)
        answered(session.disk, pending)
        copied.driver_wrote.clear()
        wrong = set(copied.differs())
        assert wrong & written_by(pending)
        assert wrong & own_pages(session)


def test_the_destination_goes_on_where_the_source_stopped(target: Target) -> None:
    """Two sessions of one controller: the second gets rings only at the hand-over."""
    with Session(target.socket) as source:
        source.disk.write(0, b"a" * BLOCK)
        with Session(target.socket, queues=0) as destination:
            shown = target.run(target.describe())["sessions"]
            assert sorted(session["started"] for session in shown) == [False, True]
            source.disk.write(8, b"b" * BLOCK)
            base = source.front_end.get_vring_base(0)
            destination.start_queue(0, start=base)
            assert destination.disk.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
            source.close()
            destination.disk.write(0, b"c" * BLOCK)
            assert destination.disk.read(0, BLOCK) == b"c" * BLOCK


def test_a_truncated_log_ends_its_session_alone(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(target.socket) as other:
        with logged_session(target) as (session, log):
            session.disk.read(0, BLOCK)
            os.ftruncate(log.fd, 0)
            session.disk.queue(Kind.IN, 0, room=BLOCK)
            session.disk.publish()
            assert session.front_end.hung_up()
        other.disk.write(0, b"z" * BLOCK)
        assert other.disk.read(0, BLOCK) == b"z" * BLOCK
    target.until_empty()
    assert "its dirty log was truncated while it was in use" in caplog.text
