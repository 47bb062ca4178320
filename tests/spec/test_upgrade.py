"""What an earlier version saved is taken over by this one.

The file was written by `drivebay rpc save_config` before there were packed rings; FOLDER stands
for the folder of its images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess

RECORDED = Path(__file__).parents[1] / "data" / "config_before_packed_rings.json"


def calls(config: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """(subsystem, method, parameters) of each call."""
    return [
        (part["subsystem"], call["method"], call.get("params", {}))
        for part in config["subsystems"]
        for call in part["config"] or []
    ]


@pytest.fixture
def upgraded(tmp_path: Path) -> Iterator[TargetProcess]:
    """This version, started with that file."""
    for image in ("a.img", "u.img"):
        (tmp_path / image).write_bytes(b"\x42" * (1 << 20))
    config = tmp_path / "vhost.json"
    config.write_text(RECORDED.read_text().replace("FOLDER", str(tmp_path)))
    target = TargetProcess(tmp_path, "-c", str(config))
    yield target
    target.kill()


def test_a_configuration_of_an_earlier_version_is_loaded_whole(upgraded: TargetProcess) -> None:
    """Every recorded call is in what this version would save; it may have more to say."""
    recorded = json.loads(RECORDED.read_text().replace("FOLDER", str(upgraded.folder)))
    names = {part["subsystem"] for part in recorded["subsystems"]}
    saved = [
        (name, call["method"], call.get("params", {}))
        for name in names
        for call in upgraded.rpc("framework_get_config", name=name) or []
    ]
    for subsystem, method, params in calls(recorded):
        assert any(
            (subsystem, method) == (s, m) and params.items() <= p.items() for s, m, p in saved
        ), f"{method} {params} is lost"


def test_its_disks_are_served(upgraded: TargetProcess) -> None:
    expected = {"vhost.0": b"\0", "vhost.1": b"\x42", "vhost.2": b"\x42"}
    for controller, content in expected.items():
        with Session(upgraded.folder / controller) as session:
            assert session.disk.read(0, 4096) == content * 4096
