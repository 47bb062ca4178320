"""`drivebay demo` as a user types it: its story, its errors, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.vm.qemu import find_qemu

pytestmark = pytest.mark.needs_qemu

DEMO_SECONDS = 300.0
MARK = "DRIVEBAY_TEST_MARK"


@dataclass
class Place:
    """Where one run of the demo keeps its things; its processes are known by a variable."""

    folder: Path
    mark: str

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def start(self, *words: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # Where the tests run in a shell's background, Ctrl-C is ignored by inheritance.
            [
                "/usr/bin/env",
                "--default-signal=INT",
                sys.executable,
                "-m",
                "drivebay",
                "demo",
                *words,
            ],
            env={
                **os.environ,
                "TMPDIR": str(self.temporary),
                "XDG_STATE_HOME": str(self.state),
                MARK: self.mark,
                **extra,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **extra: str) -> subprocess.CompletedProcess[str]:
        with self.start(**extra) as process:
            output, errors = process.communicate(timeout=DEMO_SECONDS)
            return subprocess.CompletedProcess([], process.returncode, output, errors)

    def processes(self) -> list[str]:
        """The running programs that this run started, itself included."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "comm").read_text().strip())
            except OSError:
                continue  # ended while we looked
        return found

    def assert_nothing_stayed(self) -> None:
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="drivebay-e2e-"))  # short: sockets lie in it
    folder.chmod(0o711)
    found = Place(folder, uuid.uuid4().hex)
    found.temporary.mkdir()
    yield found
    shutil.rmtree(folder)


def test_it_tells_its_story_and_leaves_only_logs(place: Place) -> None:
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    for step in ("accelerator", "target", "boot", "vda", "write", "reboot", "read", "host"):
        assert step in steps, done.stdout
    assert "holds the same bytes" in done.stdout
    assert "\x1b" not in done.stdout, "no colour and no control characters in a pipe"
    place.assert_nothing_stayed()
    logs = sorted(path.name for path in place.state.glob("drivebay/demo/*/*"))
    assert logs == ["guest-console.log", "guest-qemu.log", "target.log"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_in_the_middle_it_ends_its_children(place: Place, number: signal.Signals) -> None:
    with place.start("--keep") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ends all" in line:
                break
        assert len(place.processes()) >= 3, "the demo, its target and its QEMU"
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    place.assert_nothing_stayed()


def test_killed_without_a_word_its_children_end_too(place: Place) -> None:
    with place.start("--keep") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ends all" in line:
                break
        process.kill()
        process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while place.processes():
        assert time.monotonic() < deadline, f"still there: {place.processes()}"
        time.sleep(0.1)


def test_without_qemu_it_says_what_to_install(place: Place) -> None:
    nowhere = place.folder / "bin"
    nowhere.mkdir()
    done = place.run(PATH=str(nowhere))
    assert done.returncode == 1
    assert "error: qemu-system-x86_64 is not installed" in done.stderr
    assert "hint: sudo apt-get install --no-install-recommends qemu-system-x86" in done.stderr
    place.assert_nothing_stayed()


def test_a_guest_that_cannot_start_is_explained(place: Place) -> None:
    """A QEMU that answers what it can and then ends at once: its last words are in the hint."""
    stand_in = place.folder / "bin" / "qemu-system-x86_64"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *"-M none"*) exec {find_qemu().path} "$@";; '
        "*) echo no such luck >&2; exit 1;; esac\n"
    )
    stand_in.chmod(0o755)
    done = place.run(PATH=f"{stand_in.parent}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "error: QEMU did not start" in done.stderr
    assert "QEMU said: no such luck" in done.stderr
    place.assert_nothing_stayed()
