"""On CI a skipped test fails the run; elsewhere it is only shown with its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.style.tree import ROOT

SKIPPING = {
    "mark": "import pytest\n@pytest.mark.skip(reason='no such device')\ndef test_a(): pass\n",
    "call": "import pytest\ndef test_a(): pytest.skip('no such device')\n",
    "module": "import pytest\npytest.skip('no such device', allow_module_level=True)\n",
    "fixture": (
        "import pytest\n@pytest.fixture\ndef f(): pytest.skip('no such device')\n"
        "def test_a(f): pass\n"
    ),
}
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail\ndef test_a(): assert False\n"


def run_pytest(folder: Path, source: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(source)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env={**os.environ, "CI": ci},
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("way", SKIPPING)
def test_a_skip_fails_on_ci_and_names_its_reason(tmp_path: Path, way: str) -> None:
    done = run_pytest(tmp_path, SKIPPING[way], ci="1")
    assert done.returncode != 0, done.stdout
    assert "a skip is a failure on CI" in done.stdout
    assert "no such device" in done.stdout


def test_a_skip_elsewhere_is_only_shown(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPPING["call"], ci="")
    assert done.returncode == 0, done.stdout
    assert "no such device" in done.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, EXPECTED_FAILURE, ci="1")
    assert done.returncode == 0, done.stdout
