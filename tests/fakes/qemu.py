"""Programs that answer as QEMU does, for what is asked of it before it runs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drivebay.vm import qemu_probe

__all__ = ["ABSENT", "answers", "script", "stand_in"]

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
ANSWERS: dict[str, Any] = {
    "capabilities": {},
    "version": {"qemu": {"major": 9, "minor": 2, "micro": 1}},
    "target": {"arch": "x86_64"},
    "machines": [
        {"name": "pc-q35-9.1"},
        {"name": "pc-q35-9.2", "alias": "q35"},
        {"name": "pc-i440fx-9.2", "alias": "pc"},
    ],
    "quit": {},
}
ABSENT = object()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def answers(**changed: Any) -> str:
    """What QEMU says to the probe's questions; a text instead of an answer is a refusal."""
    names = [*ANSWERS, "user-net", "seccomp", "block-driver", *qemu_probe._TYPES]
    lines = [GREETING]
    for name in names:
        value = changed.get(name.replace("-", "_"), ANSWERS.get(name, []))
        if value is ABSENT:
            continue
        if isinstance(value, str):
            lines.append({"id": name, "error": {"class": "GenericError", "desc": value}})
        else:
            lines.append({"id": name, "return": value})
    return "".join(json.dumps(line) + "\n" for line in lines)


def stand_in(path: Path, **changed: Any) -> Path:
    """A program that gives these answers."""
    saying = path.with_suffix(".answers")
    saying.write_text(answers(**changed))
    return script(path, f"echo x >> {path}.asked; cat {saying}")
