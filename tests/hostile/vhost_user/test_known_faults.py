"""Faults that were found in other targets, each by its name, tried here on a whole target.

The classes are in docs/threat-model.md. After each test the target still serves its neighbour
and holds as many descriptors and mappings as before.
"""

from __future__ import annotations

import os
import struct

import pytest

from tests.fakes.driver import Framing, Kind, Session, Status, segment_bytes
from tests.fakes.front_end import HEADER, VERSION, FrontEnd, HungUp, Refused, Request, close_all
from tests.fakes.malice import BAD_CHAINS, BAD_RINGS
from tests.fakes.memory import MIB, adjacent
from tests.fakes.process import wait_until
from tests.fakes.ring import F_NEXT, F_WRITE, Segment
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.test_messages import drain_to_the_end, negotiated

SIZE = 16
LOOPS = (
    "chain_through_itself",
    "chain_of_two_in_a_circle",
    "chain_through_the_whole_ring_and_on",
    "indirect_through_itself",
    "indirect_that_loops",
)
OUTSIDE = (
    "data_outside_memory",
    "data_that_wraps",
    "data_of_4_gib",
    "data_over_the_end_of_memory",
    "data_into_the_hole_between_regions",
    "header_outside_memory",
    "status_outside_memory",
)
SCSI_PASS_THROUGH = 2


def expect_given_up(victim: Victim, act: str) -> None:
    with Session(victim.path, size=SIZE) as session:
        BAD_RINGS[act](session.disk.ring)
        session.disk.port.kick()
        victim.expect_sentence("queue 0 is given up")
        assert session.front_end.get_features()


def test_cve_2018_1059_a_buffer_over_two_regions_is_translated_for_its_whole_length(
    victim: Victim,
) -> None:
    """Neighbours for the guest are none in our address space: each piece has its own place."""
    with Session(victim.path, layouts=adjacent((MIB, MIB))) as session:
        memory = session.memory
        border = memory.regions[0].end
        header, status = memory.allocate(16), memory.allocate(1)
        written = bytes(range(256)) * 16
        memory.write(border - 1000, written)
        memory.write(header, struct.pack("<IIQ", Kind.OUT, 0, 64))
        chain = [Segment(header, 16, False), Segment(border - 1000, 4096, False)]
        pending = session.disk.queue_chain(chain, [Segment(status, 1, True)])
        session.disk.publish()
        assert session.disk.wait(pending).status == Status.OK
        assert session.disk.read(64, 4096) == written


@pytest.mark.parametrize("act", OUTSIDE)
def test_cve_2018_1059_an_address_outside_gives_the_queue_up(victim: Victim, act: str) -> None:
    expect_given_up(victim, act)


def test_cve_2018_1059_nothing_of_ours_is_read_behind_the_end(victim: Victim) -> None:
    """The disk holds nothing of a write whose buffer runs over the end of guest memory."""
    with Session(victim.path, size=SIZE) as session:
        session.disk.write(128, b"\x5a" * 1024)
        ring, memory = session.disk.ring, session.memory
        header = memory.allocate(16)
        memory.write(header, struct.pack("<IIQ", Kind.OUT, 0, 128))
        ring.poke_desc(0, header, 16, F_NEXT, 1)
        ring.poke_desc(1, memory.regions[-1].end - 512, 1024, F_NEXT, 2)
        ring.poke_desc(2, memory.allocate(1), 1, F_WRITE)
        ring.poke_avail(ring.avail_idx, 0)
        ring.poke_avail_idx(ring.avail_idx + 1)
        session.disk.port.kick()
        victim.expect_sentence("queue 0 is given up")
    with Session(victim.path, size=SIZE) as session:
        assert session.disk.read(128, 1024) == b"\x5a" * 1024


@pytest.mark.parametrize("act", LOOPS)
def test_cve_2019_9547_a_chain_that_loops_ends(victim: Victim, act: str) -> None:
    expect_given_up(victim, act)


@pytest.mark.parametrize("index", [256, 0x1_0000, 0x1_0001, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize(
    "request_type",
    [
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    ],
)
def test_cve_2020_10723_a_queue_number_is_not_cut_to_16_bits(
    victim: Victim, request_type: Request, index: int
) -> None:
    with negotiated(victim) as front:
        front.send(request_type, struct.pack("=II", index, 1))
        drain_to_the_end(front)
        victim.expect_end("does not exist")


@pytest.mark.parametrize("act", BAD_CHAINS)
def test_cve_2021_28361_a_part_of_no_length_comes_back_empty(victim: Victim, act: str) -> None:
    with Session(victim.path, size=SIZE) as session:
        ring = session.disk.ring
        BAD_CHAINS[act](ring)
        session.disk.port.kick()
        wait_until(lambda: ring.used_idx == 1, "the chain to come back")
        assert ring.used_at(0) == (0, 0)


def test_cve_2026_48914_scsi_pass_through_is_refused_whatever_comes_with_it(
    victim: Victim,
) -> None:
    with Session(victim.path) as session:
        for data, room in ((b"", 0), (bytes(6), 96), (bytes(65536), 65536)):
            done = session.disk.request(SCSI_PASS_THROUGH, 0, data, room)
            assert done.status == Status.UNSUPP
            assert done.data == b"\xee" * room, "nothing was written but the status"


def test_cve_2021_3544_what_a_message_brings_again_and_again_is_kept_once(victim: Victim) -> None:
    """Descriptors, memory tables and channels replaced a hundred times: counted afterwards."""
    with Session(victim.path) as session:
        front, port = session.front_end, session.ports[0]
        front.set_backend_req_fd().close()
        assert front.get_features()  # what came before is closed by then
        held = victim.target.holds()
        for _ in range(100):
            front.set_vring_call(0, port.call_fd)
            front.set_vring_err(0, port.err_fd)
            front.set_mem_table(session.memory)
            front.set_backend_req_fd().close()
        session.disk.write(0, b"\x01" * 512)
        victim.target.expect_holds(held)


def test_libvhost_user_an_indirect_table_over_two_regions_is_read_piece_by_piece(
    victim: Victim,
) -> None:
    with Session(victim.path, layouts=adjacent((MIB, MIB))) as session:
        memory, ring = session.memory, session.disk.ring
        table = memory.regions[0].end - 24
        header, data, status = memory.allocate(16), memory.allocate(512), memory.allocate(1)
        memory.write(header, struct.pack("<IIQ", Kind.IN, 0, 0))
        entries = [(header, 16, F_NEXT, 1), (data, 512, F_NEXT | F_WRITE, 2)]
        entries.append((status, 1, F_WRITE, 0))
        memory.write(table, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
        memory.write(status, b"\xee")
        ring.poke_desc(0, table, 48, 4)
        ring.poke_avail(ring.avail_idx, 0)
        ring.poke_avail_idx(ring.avail_idx + 1)
        session.disk.port.kick()
        wait_until(lambda: ring.used_idx == 1, "the answer")
        assert memory.read(status, 1) == b"\0"


def test_spdk_2228_rings_that_firmware_left_half_made(victim: Victim) -> None:
    """Kicked and enabled, but with addresses of nothing, or none at all."""
    with negotiated(victim) as front:
        kick = os.eventfd(0)
        front.set_vring_kick(0, kick)
        front.set_vring_enable(0)
        front.set_vring_num(0, SIZE)
        assert front.get_vring_base(0) == 0
        front.set_vring_kick(0, kick)
        front.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, 0))
        os.close(kick)
        drain_to_the_end(front)
        victim.expect_end()


def test_firecracker_3149_a_request_is_not_done_twice(victim: Victim) -> None:
    """A driver that publishes the same index again has offered nothing new."""
    with Session(victim.path, size=SIZE) as session:
        ring = session.disk.ring
        session.disk.write(0, b"\x07" * 512)
        before = ring.used_idx
        for _ in range(50):
            ring.poke_avail_idx(ring.avail_idx)
            session.disk.port.kick()
        assert session.disk.read(0, 512) == b"\x07" * 512
        assert ring.used_idx == before + 1


@pytest.mark.parametrize("sectors", [1 << 31, (1 << 32) - 1])
def test_open_vmm_3136_a_range_of_the_guests_choice_ends_no_process(
    victim: Victim, sectors: int
) -> None:
    with Session(victim.path) as session:
        for kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            for sector in (0, 1 << 40, (1 << 55) - 1, (1 << 64) - 1):
                done = session.disk.request(kind, data=segment_bytes(sector, sectors))
                assert done.status == Status.IOERR
        whole = session.disk.request(Kind.IN, (1 << 64) - 1, room=512, framing=Framing())
        assert whole.status == Status.IOERR


def test_spdk_1306_the_disk_goes_while_a_guest_restarts(victim: Victim) -> None:
    """A hot removal between the messages of a start: the session ends or serves, nothing else."""
    victim.target.malloc("Leaving0")
    path = victim.target.controller("leaving", "Leaving0")
    with Session(path) as session:
        session.disk.write(0, b"\x01" * 512)
        session.front_end.get_vring_base(0)
        victim.target.rpc("bdev_malloc_delete", name="Leaving0")
        disk = session.start_again(0)
        assert disk.request(Kind.IN, 0, room=512).status == Status.IOERR
    victim.target.rpc("vhost_delete_controller", ctrlr="leaving", force=True)


# ---- messages of an inflight region ----------------------------------------------------

INFLIGHT = struct.Struct("=QQHHI")


def say_inflight(front: FrontEnd, request: int, payload: bytes, fds: list[int]) -> None:
    """Send it and take whatever answer there is, descriptors and all."""
    front.send_raw(HEADER.pack(request, VERSION, len(payload)) + payload, fds)


@pytest.mark.parametrize("queues", [0, 257, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("request_type", [Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD])
def test_cve_2021_3839_a_count_of_queues_that_does_not_exist(
    victim: Victim, request_type: Request, queues: int
) -> None:
    shared = os.memfd_create("inflight", os.MFD_CLOEXEC)
    os.ftruncate(shared, 1 << 20)
    fds = [shared] if request_type == Request.SET_INFLIGHT_FD else []
    with negotiated(victim) as front:
        say_inflight(front, request_type, INFLIGHT.pack(1 << 20, 0, queues, SIZE, 0), fds)
        drain_to_the_end(front)
        victim.expect_end()
    os.close(shared)


@pytest.mark.parametrize("count", [2, 8])
def test_cve_2022_0669_surplus_descriptors_of_an_inflight_message_are_closed(
    victim: Victim, count: int
) -> None:
    read_end, write_end = os.pipe()
    shared = os.memfd_create("inflight", os.MFD_CLOEXEC)
    os.ftruncate(shared, 1 << 20)
    for _ in range(20):
        with negotiated(victim) as front:
            payload = INFLIGHT.pack(1 << 16, 0, 1, SIZE, 0)
            fds = [shared] + [write_end] * (count - 1)
            say_inflight(front, Request.SET_INFLIGHT_FD, payload, fds)
            try:
                front.get_features()
            except HungUp:
                victim.expect_end()
    os.close(shared)
    os.close(write_end)
    assert os.read(read_end, 1) == b"", "somebody still holds the other end"
    os.close(read_end)


def test_cve_2020_10726_regions_asked_for_again_and_again_are_kept_once(victim: Victim) -> None:
    with negotiated(victim) as front:
        payload = INFLIGHT.pack(0, 0, 4, SIZE, 0)
        close_all(front.ask(Request.GET_INFLIGHT_FD, payload).fds)
        assert front.get_features()  # what came before is closed by then
        held = victim.target.holds()
        for _ in range(200):
            close_all(front.ask(Request.GET_INFLIGHT_FD, payload).fds)
        assert front.get_features()
        victim.target.expect_holds(held)


def test_cve_2022_0669_regions_that_come_again_and_again_are_kept_once(victim: Victim) -> None:
    with negotiated(victim) as front:
        payload = INFLIGHT.pack(0, 0, 2, SIZE, 0)
        answer = front.ask(Request.GET_INFLIGHT_FD, payload)
        told = answer.payload
        front.tell(Request.SET_INFLIGHT_FD, told, answer.fds)
        assert front.get_features()  # the message before this one is done with
        assert front.get_features()  # what came before is closed by then
        held = victim.target.holds()
        for _ in range(200):
            front.tell(Request.SET_INFLIGHT_FD, told, answer.fds * 4)
        close_all(answer.fds)
        victim.target.expect_holds(held)


@pytest.mark.parametrize("word", range(0, 24, 2))
def test_a_region_full_of_nonsense_is_refused_with_a_sentence_or_harmless(
    victim: Victim, word: int
) -> None:
    """Each field of a queue's part in turn is wrong when a front end comes back with it."""
    with negotiated(victim) as front:
        payload = INFLIGHT.pack(0, 0, 1, SIZE, 0)
        answer = front.ask(Request.GET_INFLIGHT_FD, payload)
        told = answer.payload
    (fd, *_) = answer.fds
    _size, offset, *_ = INFLIGHT.unpack(told)
    os.pwrite(fd, b"\xff\xff", offset + word)
    with Session(victim.path, size=SIZE, queues=0) as session:
        session.front_end.tell(Request.SET_INFLIGHT_FD, told, answer.fds)
        try:
            disk = session.start_queue(0, SIZE)
            disk.write(0, b"\x01" * 512)
        except (HungUp, Refused):
            victim.expect_end("inflight|region")
    close_all(answer.fds)
