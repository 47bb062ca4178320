"""A command of the tool, run in the test's own process, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drivebay.cli.main import main

__all__ = ["Done", "Run", "run_command"]


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


def run_command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Done:
    """Run `drivebay WORDS`, and take from ``capsys`` what it printed."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return Done(code, out, err)
