"""Configuration files: their shape, their replay, and writing them whole or not at all."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drivebay.bdev.keyring import Keyring
from drivebay.bdev.registry import BdevRegistry
from drivebay.errors import HostError, UsageError
from drivebay.rpc.config import Entry, Replay, read_config, saved_config, write_config
from drivebay.rpc.jsonrpc import RpcError
from drivebay.rpc.schema import RUNTIME, STARTUP
from drivebay.target.settings import Settings


class FakeDispatcher:
    """Knows two methods, and remembers what it was called with."""

    def __init__(self) -> None:
        self.methods = {
            "set_options": SimpleNamespace(states=frozenset({STARTUP})),
            "set_either": SimpleNamespace(states=frozenset({STARTUP, RUNTIME})),
            "create": SimpleNamespace(states=frozenset({RUNTIME})),
        }
        self.calls: list[tuple[str, Any, str | None]] = []
        self.target: Any = SimpleNamespace(unloaded=[], registry=BdevRegistry())

    async def call(self, name: str, params: Any, *, state: str | None = None) -> Any:
        self.calls.append((name, params, state))
        if params == {"name": "bad"}:
            data = {"field": "name", "value": "bad", "hint": "give another"}
            raise RpcError(-32603, "spdk_json_decode_object failed", data)


def replay(dispatcher: Any, entries: list[Entry], ignore: bool = False) -> None:
    async def both() -> None:
        replayer = Replay(dispatcher, "vhost.json", entries, ignore=ignore)
        await replayer.run(STARTUP)
        await replayer.run(RUNTIME)

    asyncio.run(both())


def entry(method: str, params: Any = None, number: int = 1, subsystem: str = "bdev") -> Entry:
    return Entry(subsystem, number, method, params, {"method": method, "params": params})


def write(path: Path, *config: Any, subsystem: str = "bdev") -> Path:
    path.write_text(json.dumps({"subsystems": [{"subsystem": subsystem, "config": list(config)}]}))
    return path


def test_startup_calls_come_first_each_once() -> None:
    dispatcher = FakeDispatcher()
    calls = ["create", "set_options", "set_either", "create"]
    replay(dispatcher, [entry(name, {"n": n}) for n, name in enumerate(calls)])
    assert dispatcher.calls == [
        ("set_options", {"n": 1}, STARTUP),
        ("set_either", {"n": 2}, STARTUP),
        ("create", {"n": 0}, RUNTIME),
        ("create", {"n": 3}, RUNTIME),
    ]


def test_a_failing_entry_is_named_with_its_reason() -> None:
    with pytest.raises(UsageError) as caught:
        replay(FakeDispatcher(), [entry("create", {"name": "bad"}, 7)])
    sentence = str(caught.value)
    for part in ("entry 7", "'bdev'", "vhost.json", "create", "'name' is 'bad'", "give another"):
        assert part in sentence
    assert "--json-ignore-init-errors" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("bdev_rbd_create", "Ceph RBD"),
        ("bdev_nvme_attach_controller", "NVMe"),
        ("vhost_create_scsi_controller", "vhost-scsi"),
        ("no_such_thing", "no such method"),
    ],
)
def test_a_part_that_is_lacking_is_named(method: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        replay(FakeDispatcher(), [entry(method)])


def test_ignoring_errors_goes_on_and_forgets_nothing() -> None:
    dispatcher = FakeDispatcher()
    failing = [entry("bdev_rbd_create"), entry("create", {"name": "bad"}, 2)]
    replay(dispatcher, [*failing, entry("create", {"name": "good"}, 3)], ignore=True)
    assert dispatcher.calls[-1] == ("create", {"name": "good"}, RUNTIME)
    assert dispatcher.target.unloaded == failing
    controller: Any = SimpleNamespace(name="vhost.0", save=list)
    target: Any = SimpleNamespace(
        wishes=[],
        arrays=SimpleNamespace(calls=list),
        settings=Settings(),
        keyring=Keyring(),
        registry=[],
        controllers=[controller],
        unloaded=[*failing, entry("vfu_create", {}, 1, "vfio_user_target")],
    )
    saved = {part["subsystem"]: part["config"] for part in saved_config(target)["subsystems"]}
    assert saved["bdev"][-2:] == [failing[0].call, failing[1].call]
    assert saved["vfio_user_target"] == [{"method": "vfu_create", "params": {}}]
    assert saved["vhost_blk"] == []


def test_a_file_of_spdks_shape_is_read(tmp_path: Path) -> None:
    call = {"method": "bdev_null_create", "params": {"name": "N"}}
    path = write(tmp_path / "c.json", call, [call, call], {"method": "bdev_wait_for_examine"})
    entries = read_config(path)
    assert [found.number for found in entries] == [1, 2, 3, 4]
    assert entries[1].params == {"name": "N"}
    assert entries[3].params is None
    path.write_text('{"subsystems": [{"subsystem": "scsi", "config": null}]}')
    assert read_config(path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{ bad", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("[]", "no list 'subsystems'"),
        ('{"subsystems": 5}', "no list 'subsystems'"),
        ('{"subsystems": [5]}', "subsystem 1"),
        ('{"subsystems": [{"subsystem": "bdev", "config": {}}]}', "subsystem 1"),
        ('{"subsystems": [{"subsystem": "bdev", "config": [{}]}]}', "entry 1 of subsystem 'bdev'"),
        (
            '{"subsystems": [{"subsystem": "bdev", "config": [{"method": "m", "params": 1}]}]}',
            "entry 1 of subsystem 'bdev'",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused_with_a_sentence(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_config(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="not JSON"):
        read_config(path)


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"none\.json") as caught:
        read_config(tmp_path / "none.json")
    assert caught.value.errno == errno.ENOENT


def test_writing_replaces_the_file_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_config(path, {"subsystems": []})
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    before = path.stat().st_ino
    write_config(path, {"subsystems": [1]})
    assert json.loads(path.read_text()) == {"subsystems": [1]}
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_ino != before, "it must be replaced, not rewritten in place"
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.json"
    write_config(path, {"subsystems": []})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match=r"c\.json") as caught:
        write_config(path, {"subsystems": [1]})
    assert caught.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"subsystems": []}
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]
