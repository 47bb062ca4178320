"""save_config and load_config: which calls are made, in which order, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from drivebay.cli import rpc
from drivebay.cli.rpc import load_config, save_config
from drivebay.errors import DrivebayError, UsageError

STARTUP = ("bdev_set_options", "framework_start_init")
ALWAYS = ("rpc_get_methods", "framework_set_scheduler")
RUNTIME = ("bdev_malloc_create", "bdev_null_create", "vhost_create_blk_controller")


class RecordingClient:
    """A target that has methods and states, and remembers what it was asked."""

    def __init__(self, *, started: bool = True) -> None:
        self.started = started
        self.failing: str | None = None
        self.calls: list[tuple[str, Any]] = []

    def call(self, method: str, params: Any = None) -> Any:
        if method == "rpc_get_methods":
            return self._methods((params or {}).get("current", False))
        if method == "framework_get_subsystems":
            return [{"subsystem": "bdev", "depends_on": []}, {"subsystem": "vhost_blk"}]
        if method == "framework_get_config":
            return [{"method": f"{params['name']}_call"}]
        assert method in self._methods(True), f"{method} was called in the wrong state"
        if method == self.failing:
            raise DrivebayError(f"{method}: No such device (code -19)", hint="look")
        self.calls.append((method, params))
        if method == "framework_start_init":
            self.started = True
        return True

    def _methods(self, current: bool) -> list[str]:
        if not current:
            return [*STARTUP, *ALWAYS, *RUNTIME]
        return [*ALWAYS, *(RUNTIME if self.started else STARTUP)]


@pytest.fixture(autouse=True)
def _direct_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rpc, "call", lambda client, method, params=None: client.call(method, params)
    )


def config(*methods: str) -> dict[str, Any]:
    calls = [{"method": method, "params": {"n": number}} for number, method in enumerate(methods)]
    return {"subsystems": [{"subsystem": "bdev", "config": calls}]}


def test_saving_asks_each_subsystem() -> None:
    assert save_config(RecordingClient()) == {  # type: ignore[arg-type]
        "subsystems": [
            {"subsystem": "bdev", "config": [{"method": "bdev_call"}]},
            {"subsystem": "vhost_blk", "config": [{"method": "vhost_blk_call"}]},
        ]
    }


def test_a_waiting_target_is_started_between_the_two_kinds_of_calls() -> None:
    client = RecordingClient(started=False)
    load_config(
        client,  # type: ignore[arg-type]
        config("bdev_malloc_create", "bdev_set_options", "vhost_create_blk_controller"),
    )
    assert client.calls == [
        ("bdev_set_options", {"n": 1}),
        ("framework_start_init", None),
        ("bdev_malloc_create", {"n": 0}),
        ("vhost_create_blk_controller", {"n": 2}),
    ]


def test_what_belongs_before_the_start_is_skipped_aloud_in_a_running_target(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = RecordingClient()
    load_config(client, config("bdev_set_options", "bdev_null_create"))  # type: ignore[arg-type]
    assert client.calls == [("bdev_null_create", {"n": 1})]
    assert "skipped, because they belong before the start: bdev_set_options" in (
        capsys.readouterr().err
    )


def test_a_method_that_is_not_there_stops_the_load_before_it_begins() -> None:
    client = RecordingClient(started=False)
    with pytest.raises(DrivebayError, match=r"entry 2 of 'bdev' .* calls 'bdev_ftl_create'"):
        load_config(client, config("bdev_null_create", "bdev_ftl_create"))  # type: ignore[arg-type]
    assert client.calls == []


def test_the_first_failure_ends_the_load_and_names_its_entry() -> None:
    client = RecordingClient()
    client.failing = "bdev_null_create"
    said = r"entry 2 of 'bdev' .* failed: bdev_null_create: No such device \(code -19\)"
    with pytest.raises(DrivebayError, match=said) as caught:
        load_config(
            client,  # type: ignore[arg-type]
            config("bdev_malloc_create", "bdev_null_create", "vhost_create_blk_controller"),
        )
    assert caught.value.hint == "look"
    assert client.calls == [("bdev_malloc_create", {"n": 0})]


def test_batches_are_flattened() -> None:
    client = RecordingClient()
    calls = [[{"method": "bdev_malloc_create"}, {"method": "bdev_null_create"}]]
    load_config(client, {"subsystems": [{"subsystem": "bdev", "config": calls}]})  # type: ignore[arg-type]
    assert [method for method, _ in client.calls] == ["bdev_malloc_create", "bdev_null_create"]


@pytest.mark.parametrize("empty", [None, []])
def test_a_subsystem_without_calls_is_fine(empty: Any) -> None:
    client = RecordingClient()
    load_config(client, {"subsystems": [{"subsystem": "bdev", "config": empty}]})  # type: ignore[arg-type]
    assert client.calls == []


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {},
        {"subsystems": {}},
        {"subsystems": ["bdev"]},
        {"subsystems": [{"config": []}]},
        {"subsystems": [{"subsystem": 1, "config": []}]},
        {"subsystems": [{"subsystem": "bdev", "config": {}}]},
        {"subsystems": [{"subsystem": "bdev", "config": ["bdev_null_create"]}]},
        {"subsystems": [{"subsystem": "bdev", "config": [{"params": {}}]}]},
    ],
)
def test_files_of_another_shape_are_refused(broken: Any) -> None:
    client = RecordingClient()
    with pytest.raises(UsageError, match="configuration"):
        load_config(client, broken)  # type: ignore[arg-type]
    assert client.calls == []
