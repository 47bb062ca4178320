"""On CI a skipped test fails the run; elsewhere it is only shown with its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def run_pytest(folder: Path, sources: dict[str, str], ci: str) -> tuple[int, str]:
    """Run made-up modules under our settings; returns the exit code and the output."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name, source in sources.items():
        (folder / f"test_{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", str(folder)],
        cwd=folder,
        env={**os.environ, "CI": ci},
        text=True,
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_a_skip_fails_on_ci_and_names_its_reason(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, {**SKIPPING, "xfail": EXPECTED_FAILURE}, ci="1")
    assert code == 1, output
    reasons = output.count("a skip is a failure on CI: Skipped: no such device")
    assert reasons == len(SKIPPING), output
    # An expected failure is no skip.
    assert "1 xfailed" in output


def test_a_skip_elsewhere_is_only_shown(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, SKIPPING, ci="")
    assert code == 0, output
    assert "no such device" in output
