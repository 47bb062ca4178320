"""Images whose headers are anything, and ends of the tool and of qemu-img at a bad moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.errors import DrivebayError
from drivebay.vm.images.formats import check_header, find_format
from tests.fakes.process import wait_until

MIB = 1 << 20
FORMATS = ("qcow2", "vmdk", "vhdx", "vdi")
_INTERESTING = {"qcow2": [0, 4, 8, 16, 20, 32, 72], "vmdk": [0, 12, 28, 36, 512, 700], "vdi": [64],
                "vhdx": [0, 192 << 10, (192 << 10) + 8, (192 << 10) + 32, MIB, 2 * MIB, 3 * MIB,
                         3 * MIB + 32]}  # fmt: skip
# Where a header, a table or a length lies that is looked at, or anywhere.
_PLACES = {
    kind: st.one_of(st.sampled_from(places), st.integers(0, 4 * MIB))
    for kind, places in _INTERESTING.items()
}
_BYTES = st.one_of(
    st.binary(min_size=1, max_size=64),
    st.sampled_from([b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), bytes(7) + b"\1"]),
)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wholes")
    raw = folder / "raw"
    raw.write_bytes(b"x" * MIB)
    for kind in FORMATS:
        options = ["-o", "block_size=1M"] if kind == "vhdx" else []
        words = ["qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(raw)]
        words.append(str(folder / kind))
        subprocess.run(words, check=True)
    return {kind: folder / kind for kind in FORMATS}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from(FORMATS))
def test_any_header_is_taken_or_refused_in_a_sentence(
    wholes: dict[str, Path], data: st.DataObject, kind: str
) -> None:
    whole = wholes[kind]
    changes = data.draw(st.lists(st.tuples(_PLACES[kind], _BYTES), max_size=4))
    length = data.draw(st.one_of(st.none(), st.integers(0, whole.stat().st_size)))
    with changed(whole, changes, length):
        with contextlib.suppress(DrivebayError):
            find_format(whole, f"x.{kind}", None)
        with contextlib.suppress(DrivebayError):
            check_header(whole, kind, "x")


@contextlib.contextmanager
def changed(whole: Path, changes: list[tuple[int, bytes]], length: int | None) -> Iterator[None]:
    """A file with other bytes here and there, or cut off; it is as it was afterwards."""
    size = whole.stat().st_size
    before = whole.read_bytes()
    with whole.open("r+b") as opened:
        for offset, text in changes:
            opened.seek(offset)
            opened.write(text)
        if length is not None:
            opened.truncate(length)
    yield
    with whole.open("r+b") as opened:
        opened.truncate(size)
        for at in [*(offset for offset, _ in changes), *([] if length is None else [length])]:
            end = None if at == length else at + 64
            opened.seek(at)
            opened.write(before[at:end])


# ---- bad moments --------------------------------------------------------------------------------

# It converts for as long as it lives; all else is left to the real one.
SLOW = """#!/bin/sh
if [ "$1" = convert ]; then
    echo '    (12.00/100%)'
    {instead}
    exec sleep 60
fi
exec {real} "$@"
"""

Import = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start_import(tmp_path: Path) -> Iterator[Import]:
    """`drivebay image import` of a qcow2 image, with a qemu-img that does something else."""
    started = []
    disk = tmp_path / "private" / "disk.qcow2"
    disk.parent.mkdir(mode=0o700)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    disk.chmod(0o600)
    tools = tmp_path / "tools"
    tools.mkdir()
    real = subprocess.run(["which", "qemu-img"], check=True, capture_output=True, text=True)

    def start(instead: str) -> subprocess.Popen[str]:
        shim = tools / "qemu-img"
        shim.write_text(SLOW.format(instead=instead, real=real.stdout.strip()))
        shim.chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, "-m", "drivebay", "image", "import", str(disk)],
            env={
                **os.environ,
                "XDG_DATA_HOME": str(tmp_path / "data"),
                "PATH": f"{tools}:{os.environ['PATH']}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str | None:
    """None of one that has ended meanwhile: qemu-img is asked for other things before."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    except (FileNotFoundError, ProcessLookupError):
        return None


def names_of_images(tmp_path: Path) -> set[str]:
    folder = tmp_path / "data" / "drivebay" / "images"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def converting(process: subprocess.Popen[str]) -> int:
    """The id of the qemu-img that converts, which is a sleep by now."""

    def found() -> list[int]:
        return [pid for pid in children_of(process.pid) if command_of(pid) == "sleep"]

    wait_until(lambda: bool(found()), "a conversion")
    return found()[0]


def test_ctrl_c_leaves_nothing(start_import: Import, tmp_path: Path) -> None:
    process = start_import("")
    child = converting(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert names_of_images(tmp_path) == {".lock"}
    assert not Path(f"/proc/{child}").exists()


def test_a_killed_tool_leaves_no_process_and_the_next_one_sweeps(
    start_import: Import, tmp_path: Path
) -> None:
    process = start_import("")
    child = converting(process)
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), "the end of qemu-img")
    assert any(name.startswith(".new-") for name in names_of_images(tmp_path))
    second = start_import("exec qemu-img-is-not-there 2>/dev/null || exit 1")
    assert second.wait(30) == 1
    assert names_of_images(tmp_path) == {".lock"}


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("kill -XCPU $$", "ended by signal 24, as at a limit"),
        ("echo 'qemu-img: error while writing at byte 5: Input/output error' >&2; exit 1",
         "error while writing at byte 5: Input/output error"),
        ("exit 1", "can't convert 'disk.qcow2': nothing"),
        ("exit 0", "qemu-img wrote 0 bytes of 'disk.qcow2', not 1048576"),
    ],
)  # fmt: skip
def test_a_qemu_img_that_dies_is_said(
    start_import: Import, tmp_path: Path, instead: str, said: str
) -> None:
    process = start_import(instead)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said in err
    assert "Traceback" not in err
    assert names_of_images(tmp_path) == {".lock"}


@pytest.mark.needs_root
def test_root_s_qemu_img_is_nobody_and_may_only_read(start_import: Import) -> None:
    process = start_import("")
    child = converting(process)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines()
    )
    assert status["Uid"].split()[0] != "0"
    read_search = f"{1 << 2:016x}"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert status[kind] == read_search, kind
    assert status["NoNewPrivs"] == "1"
    limits = Path(f"/proc/{child}/limits").read_text()
    assert str(MIB + MIB) in next(line for line in limits.splitlines() if "file size" in line)


@pytest.mark.needs_root
def test_a_root_that_can_not_give_away_the_right_to_read_imports_all_the_same(
    tmp_path: Path,
) -> None:
    """As in containers, whose root lacks CAP_DAC_READ_SEARCH."""
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    lacking = ["setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search", "--"]
    done = subprocess.run(
        [*lacking, sys.executable, "-m", "drivebay", "image", "import", str(disk), "-q"],
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path / "data")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "disk\n"), done.stderr
