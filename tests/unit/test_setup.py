"""tools/setup.py: what it finds missing, and what it says when it may not install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def some_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package database of our own: 'here' is installed, 'gone' was removed, 'new' is unknown."""
    listed = tmp_path / "packages.txt"
    listed.write_text("# a comment\nhere  # reason\n\ngone  # reason\nnew   # reason\n")
    monkeypatch.setattr(setup, "PACKAGE_LIST", listed)
    query = tmp_path / "dpkg-query"
    query.write_text("#!/bin/sh\necho here installed\necho gone config-files\nexit 1\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.usefixtures("some_packages")
def test_only_what_is_missing_is_wanted() -> None:
    assert setup.wanted_packages() == ["here", "gone", "new"]
    assert setup.missing_packages() == ["gone", "new"]


@pytest.mark.usefixtures("some_packages")
def test_without_root_and_sudo_it_names_privilege_packages_and_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    real_which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "sudo" else real_which(name))
    with pytest.raises(setup.SetupError, match="needs root: gone new") as caught:
        setup.install_packages()
    assert caught.value.hint.endswith("apt-get install --no-install-recommends gone new")


def test_a_failed_step_shows_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(setup.SetupError, match="failed with exit code 7"):
        setup.run(["sh", "-c", "echo the reason; exit 7"])
    assert "the reason" in capfd.readouterr().out


def test_every_listed_package_has_a_reason() -> None:
    for line in setup.PACKAGE_LIST.read_text().splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[a-z0-9.+-]+ +# .{5,}", line), (
            line
        )


def test_a_changed_source_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    source = tmp_path / "a.py"
    source.write_text("1")
    before = setup.digest("x", files=[source])
    assert setup.digest("x", files=[source]) == before
    source.write_text("2")
    assert setup.digest("x", files=[source]) != before


def test_listed_sources_are_those_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "tools/list_sources.py", "src/drivebay"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=30,
        check=True,
    )
    listed = done.stdout.splitlines()
    assert len(listed) == len(set(listed))
    assert {"errors.py", "py.typed", "wire/__init__.py", "memory/platform.h"} <= set(listed)
    assert not any("__pycache__" in name for name in listed)
