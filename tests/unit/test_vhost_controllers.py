"""Making, showing and deleting controllers, and what their sockets look like in a folder."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.errors import AlreadyExists, HostError, InUse, NotFound, UsageError
from drivebay.vhost import controllers
from drivebay.vhost.cpumask import parse_cpumask
from drivebay.wire.virtio_blk import BlkFeature
from tests.fakes.dataplane import FakeBdev, FakeChannel
from tests.fakes.front_end import FrontEnd
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import Serving, negotiate, start_ring


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    read_only = FakeBdev("Ro0", readonly=True)
    plain = FakeBdev("Plain0", io_types=frozenset({"read", "write"}), block_size=4096)
    with Serving(tmp_path, monkeypatch, FakeBdev(), read_only, plain, cores=2) as running:
        yield running


@contextmanager
def session_with_a_ring(serving: Serving) -> Iterator[FrontEnd]:
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        yield front
        for fd in fds:
            os.close(fd)


def test_a_controller_describes_itself_as_spdk_does(serving: Serving) -> None:
    controller = serving.create(cpumask="0x2")
    assert serving.call(controller.describe) == {
        "ctrlr": "vhost.0",
        "cpumask": "0x2",
        "delay_base_us": 0,
        "iops_threshold": 60000,
        "socket": str(serving.directory / "vhost.0"),
        "sessions": [],
        "backend_specific": {
            "block": {"readonly": False, "bdev": "Fake0", "transport": "vhost_user_blk"}
        },
    }


def test_sessions_are_shown_by_number_id_and_name(serving: Serving) -> None:
    controller = serving.create()
    with serving.connect() as front:
        negotiate(front)
    serving.until_empty()
    with serving.connect() as front:
        negotiate(front)
        assert serving.call(controller.describe)["sessions"] == [
            {
                "vid": 0,
                "id": 1,
                "name": "vhost.0s0",
                "started": False,
                "max_queues": 0,
                "inflight_task_cnt": 0,
            }
        ]


def test_packed_rings_are_offered_only_if_asked_for_and_saved(serving: Serving) -> None:
    plain = serving.create("vhost.s")
    packed = serving.create("vhost.p", packed_ring=True)
    assert packed.features() ^ plain.features() == 1 << 34
    ((_method, params),) = packed.save()
    assert params["packed_ring"] is True
    ((_method, params),) = plain.save()
    assert "packed_ring" not in params


def test_a_socket_may_belong_to_another_user_also_after_a_restart(
    needs_root: None, serving: Serving
) -> None:
    controller = serving.create("vhost.o", socket_uid=65534)
    found = (serving.directory / "vhost.o").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, os.getegid(), 0o600)
    ((_method, params),) = controller.save()
    assert params["socket_uid"] == 65534


def test_a_serial_number_may_be_chosen_and_is_saved(serving: Serving) -> None:
    controller = serving.create("vhost.s", serial="web-system")
    assert controller.serial == b"web-system"
    ((_method, params),) = controller.save()
    assert params["serial"] == "web-system"
    assert serving.create("vhost.d").serial == b"Fake0"
    for serial in ("", "a b", "ü", "a" * 21, "a\n"):
        with pytest.raises(UsageError, match="is no serial number"):
            serving.create("vhost.x", serial=serial)


def test_save_is_the_call_that_makes_it_again(serving: Serving) -> None:
    controller = serving.create(cpumask="[0-1]", readonly=True)
    ((method, params),) = serving.call(controller.save)
    assert method == "vhost_create_blk_controller"
    assert params == {
        "ctrlr": "vhost.0",
        "dev_name": "Fake0",
        "cpumask": "3",
        "readonly": True,
        "transport": "vhost_user_blk",
    }


def bits(features: int) -> set[int]:
    return {bit for bit in range(64) if features >> bit & 1}


ALWAYS = {
    BlkFeature.SEG_MAX,
    BlkFeature.BLK_SIZE,
    BlkFeature.TOPOLOGY,
    BlkFeature.MQ,
    BlkFeature.RING_INDIRECT_DESC,
    BlkFeature.RING_EVENT_IDX,
    BlkFeature.VERSION_1,
}


@pytest.mark.parametrize(
    ("dev_name", "readonly", "more"),
    [
        (
            "Fake0",
            False,
            {
                BlkFeature.FLUSH,
                BlkFeature.CONFIG_WCE,
                BlkFeature.DISCARD,
                BlkFeature.WRITE_ZEROES,
            },
        ),
        ("Fake0", True, {BlkFeature.FLUSH, BlkFeature.CONFIG_WCE, BlkFeature.RO}),
        ("Ro0", False, {BlkFeature.FLUSH, BlkFeature.CONFIG_WCE, BlkFeature.RO}),
        ("Plain0", False, set()),
    ],
)
def test_features_follow_the_bdev(
    serving: Serving, dev_name: str, readonly: bool, more: set[BlkFeature]
) -> None:
    serving.create("vhost.f", dev_name, readonly=readonly)
    with serving.connect("vhost.f") as front:
        assert bits(front.get_features()) == ALWAYS | more | {26, 30}


def test_the_configuration_is_in_sectors_whatever_the_block_size(serving: Serving) -> None:
    controller = serving.create("vhost.p", "Plain0")
    space = controller.config_space(writeback=True)
    assert int.from_bytes(space[0:8], "little") == 2048 * 8
    assert int.from_bytes(space[20:24], "little") == 4096
    assert space[36:60] == bytes(24)  # neither discard nor write zeroes


def test_discard_is_aligned_to_blocks(serving: Serving) -> None:
    serving.registry.bdevs["Big0"] = FakeBdev("Big0", block_size=4096)
    space = serving.create("vhost.b", "Big0").config_space(writeback=True)
    assert int.from_bytes(space[44:48], "little") == 8


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        ({"dev_name": "nosuch"}, NotFound, errno.ENODEV),
        ({"transport": "bogus"}, UsageError, errno.EINVAL),
        ({"cpumask": ""}, UsageError, errno.EINVAL),
        ({"cpumask": "0"}, UsageError, errno.EINVAL),
        ({"cpumask": "0x4"}, UsageError, errno.EINVAL),
        ({"cpumask": "[0,9]"}, UsageError, errno.EINVAL),
        ({"cpumask": "-1"}, UsageError, errno.EINVAL),
        ({"cpumask": "[1-0]"}, UsageError, errno.EINVAL),
        ({"name": ""}, UsageError, errno.EINVAL),
        ({"name": "a\0b"}, UsageError, errno.EINVAL),
        ({"name": "a/b"}, HostError, errno.EIO),
        ({"name": ".."}, HostError, errno.EIO),
        ({"name": "plainfile"}, HostError, errno.EIO),
        ({"name": "taken"}, AlreadyExists, errno.EEXIST),
        ({"name": "x" * 108}, UsageError, errno.EINVAL),
    ],
    ids=str,
)
def test_what_is_refused_leaves_nothing_behind(
    serving: Serving, arguments: dict[str, object], error: type[Exception], code: int
) -> None:
    (serving.directory / "plainfile").write_text("not ours")
    serving.create("taken")
    before = sorted(serving.directory.iterdir())
    with pytest.raises(error) as caught:
        serving.create(**{"name": "vhost.0", **arguments})  # type: ignore[arg-type]
    assert getattr(caught.value, "errno", None) == code
    assert sorted(serving.directory.iterdir()) == before
    assert [controller.name for controller in serving.controllers] == ["taken"]


def test_a_path_that_just_fits_is_served(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("s")
    name = "n" * (107 - len(os.fsencode(folder)) - 1)
    with Serving(folder, monkeypatch) as serving:
        serving.create(name)
        with serving.connect(name) as front:
            assert front.get_features()
        with pytest.raises(UsageError, match="108 bytes long"):
            serving.create(name + "n")


def test_only_the_owner_may_connect(serving: Serving) -> None:
    serving.create()
    mode = (serving.directory / "vhost.0").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_stale_socket_is_replaced(serving: Serving) -> None:
    path = serving.directory / "vhost.0"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    serving.create()
    with serving.connect() as front:
        assert front.get_features()


def test_a_socket_that_somebody_serves_is_left_alone(serving: Serving) -> None:
    path = serving.directory / "vhost.0"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(os.fspath(path))
        alive.listen()
        with pytest.raises(InUse, match="another process"):
            serving.create()
    assert path.exists()


def test_deleting_removes_the_socket_unless_it_is_no_longer_ours(serving: Serving) -> None:
    path = serving.directory / "vhost.0"
    serving.create()
    serving.run(serving.controllers.delete("vhost.0"))
    assert not path.exists()
    serving.create()
    path.unlink()
    path.write_text("somebody else's")
    serving.run(serving.controllers.delete("vhost.0"))
    assert path.read_text() == "somebody else's"
    path.unlink()


def test_deleting_under_a_session_needs_force(serving: Serving) -> None:
    serving.create()
    with serving.connect() as front:
        negotiate(front)
        with pytest.raises(InUse, match="1 connected session") as caught:
            serving.run(serving.controllers.delete("vhost.0"))
        assert caught.value.hint is not None
        assert "force" in caught.value.hint
        assert front.get_queue_num() == 256
        serving.run(serving.controllers.delete("vhost.0", force=True))
        assert front.hung_up()
    with pytest.raises(NotFound):
        serving.controllers.get("vhost.0")
    serving.create()  # the name is free again


def test_a_front_end_that_has_just_left_is_nobody_s_session(serving: Serving) -> None:
    for _ in range(20):
        serving.create()
        with serving.connect() as front:
            negotiate(front)
        serving.run(serving.controllers.delete("vhost.0"))


def test_the_disk_of_a_deleted_controller_has_no_user(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = serving.registry
    close = registry.close_channel

    async def close_slowly(channel: FakeChannel) -> None:
        await asyncio.sleep(0.02)
        await close(channel)

    monkeypatch.setattr(registry, "close_channel", close_slowly)
    serving.create()
    with session_with_a_ring(serving):
        serving.until(lambda: registry.channels)
        serving.run(serving.controllers.delete("vhost.0", force=True))
        assert not registry.channels


def test_deleting_does_not_wait_for_a_bdev_that_never_answers(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controllers, "LETTING_GO_S", 0.05)
    serving.create()
    with session_with_a_ring(serving) as front:
        serving.plane.hold = {"stop"}
        serving.run(serving.controllers.delete("vhost.0", force=True))
        assert front.hung_up()
        assert serving.registry.channels
        serving.call(serving.plane.release)


def test_the_end_does_not_wait_for_ever(serving: Serving) -> None:
    """A bdev that never answers: the caller is told, and may ask again."""
    serving.create()
    with session_with_a_ring(serving) as front:
        serving.plane.hold = {"stop"}
        assert serving.run(serving.controllers.close(0.05)) is False
        assert front.hung_up()
        serving.call(serving.plane.release)
        assert serving.run(serving.controllers.close(20)) is True


def test_deleting_what_is_not_there(serving: Serving) -> None:
    with pytest.raises(NotFound, match="'nosuch'"):
        serving.run(serving.controllers.delete("nosuch"))


def test_sentences_beyond_a_burst_are_only_counted(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.create()
    for _ in range(50):
        with serving.connect() as front:
            front.send_raw(bytes(12))
            assert front.hung_up()
    serving.until_empty()
    ends = [text for text in caplog.messages if " ends: message 0 has version 0" in text]
    assert len(ends) == 20


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("0x1", 1),
        ("3", 3),
        ("0XfF", 255),
        ("[0]", 1),
        ("[1,3-5]", 0b111010),
        ("[ 0 , 2 ]", 5),
    ],
)
def test_cpumasks(text: str, mask: int) -> None:
    assert parse_cpumask(text) == mask


@pytest.mark.parametrize(
    "text", ["", "0x", "0", "[]", "[0", "0]", "[a]", "[-1]", "[2-1]", "[9999999]", "g", "1,2"]
)
def test_what_is_no_cpumask(text: str) -> None:
    with pytest.raises(UsageError):
        parse_cpumask(text)
