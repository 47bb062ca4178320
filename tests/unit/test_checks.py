"""tools/checks.py: parts are chosen by name, a failed or hung part is a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import checks


def test_check_is_the_beginning_of_test() -> None:
    in_order = [part for part in checks.chosen(["test"]) if not part.beside]
    assert checks.chosen(["check"]) == in_order[: len(checks.CHECK)]
    assert [part.name for part in checks.chosen(["unit", "lint"])] == ["unit", "lint"]
    both = checks.chosen(["test", "asan"])
    assert both == [part for part in (*checks.TEST, *checks.ASAN) if part.name != "fuzz"]
    assert "asan-fuzz" in [part.name for part in both]


@pytest.mark.parametrize("words", [[], ["no-such-part"], ["check", "no-such-part"]])
def test_an_unknown_part_is_refused_with_the_names_there_are(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="there are: vms format .* check test asan$"):
        checks.chosen(words)


def test_a_failed_part_fails() -> None:
    assert checks.run_part(checks.Part("good", [sys.executable, "-c", ""]))[0]
    assert not checks.run_part(checks.Part("bad", [sys.executable, "-c", "exit(1)"]))[0]


def test_parts_run_beside_the_others_and_come_last(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import time; time.sleep(0.5); print('slow')"
    slow = checks.Part("slow", [sys.executable, "-c", code], beside=True)
    quick = checks.Part("quick", [sys.executable, "-c", "print('quick'); exit(1)"])
    results = checks.run_parts([slow, quick])
    assert [(name, passed) for name, passed, _ in results] == [("quick", False), ("slow", True)]
    said = capfd.readouterr().out
    assert said.index("\nquick\n") < said.index("\nslow\n")


def test_a_part_that_runs_beside_begins_in_its_turn(tmp_path: Path) -> None:
    """Those under sanitizers need their build."""
    build = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(tmp_path / 'b')!r}).touch()"
    after = f"import pathlib; exit(not pathlib.Path({str(tmp_path / 'b')!r}).exists())"
    parts = [
        checks.Part("build", [sys.executable, "-c", build]),
        checks.Part("after", [sys.executable, "-c", after], beside=True),
    ]
    assert all(passed for _, passed, _ in checks.run_parts(parts))


def test_a_hung_part_is_stopped_and_fails() -> None:
    hung = checks.Part("hung", [sys.executable, "-c", "import time; time.sleep(600)"], limit_s=1)
    passed, seconds = checks.run_part(hung)
    assert not passed
    assert seconds >= 1
