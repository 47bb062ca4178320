"""The page docs/writing-a-bdev.md does what it says: its module builds, passes its test, serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import VhostUserBlk
from tests.fakes.process import TargetProcess

PAGE = Path(__file__).resolve().parents[2] / "docs" / "writing-a-bdev.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIMIT_S = 120
MODULE_LINES = 90


def blocks(language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(PAGE.read_text()) if found == language]


def shell(script: str, folder: Path, **more: str) -> str:
    """Run a block of the page where our Python and our command come first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, **more},
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the module, built as the page says."""
    folder = tmp_path_factory.mktemp("author")
    [module], [test] = blocks("cython"), blocks("python")
    assert len(module.splitlines()) <= MODULE_LINES
    (folder / "rotating.pyx").write_text(module)
    (folder / "test_rotating.py").write_text(test)
    build, _ = blocks("sh")
    shell(build, folder)
    folder.chmod(0o755)
    (folder / "rotating.so").chmod(0o755)
    return folder


def test_its_module_passes_its_test(built: Path) -> None:
    assert shell(f"{sys.executable} test_rotating.py", built) == "all right\n"


def test_its_module_has_no_yellow_line_on_the_path(built: Path) -> None:
    """As tests/style looks at ours: the compiler hints at each hidden use of the GIL."""
    command = [sys.executable, "-m", "cython", "-3", "-Wextra", "rotating.pyx", "-o", "again.c"]
    done = subprocess.run(command, cwd=built, text=True, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 0
    assert "performance hint" not in done.stdout + done.stderr


def test_a_target_loads_and_serves_it(built: Path, tmp_path: Path) -> None:
    target = TargetProcess(tmp_path)
    try:
        _, load = blocks("sh")
        for line in load.splitlines():
            line = line.replace("drivebay rpc", f"drivebay rpc --socket {target.rpc_path}")
            shell(line, built)
        [shown] = target.rpc("bdev_get_bdevs", name="R0")
        assert shown["driver_specific"] == {"rotating": {"seek_us": 4000}}
        with VhostUserBlk(str(tmp_path / "vhost.0")) as disk:
            assert disk.capacity_bytes == 64 << 20
            for offset in (0, 4096, 1 << 20, 63 << 20):
                disk.write(offset, offset.to_bytes(8, "little") * 512)
            disk.flush()
            for offset in (63 << 20, 0, 4096, 1 << 20):
                assert disk.read(offset, 4096) == offset.to_bytes(8, "little") * 512
        calls = target.rpc("framework_get_config", name="bdev")
        [call] = [call for call in calls if call["method"] == "drivebay_bdev_python_create"]
        target.rpc("vhost_delete_controller", ctrlr="vhost.0")
        target.rpc("drivebay_bdev_python_delete", name="R0")
        target.rpc(call["method"], **call["params"])
        target.rpc("bdev_malloc_delete", name="M0")  # it goes with its base
        assert target.rpc("bdev_get_bdevs") == []
        assert target.stop() == 0
    finally:
        target.kill()
