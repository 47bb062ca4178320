"""The frame of the command line: help, version, exit codes, and what is printed where."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from drivebay.cli import main as cli_main
from drivebay.cli.main import COMMANDS, Command, main
from drivebay.cli.output import print_error, print_json, print_table
from drivebay.errors import HostError, InUse, Unreachable, UsageError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed
        assert command.summary in printed


@pytest.mark.parametrize("words", [["--version"], ["-v"], ["vhost", "--version"], ["vhost", "-v"]])
def test_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("drivebay ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"drivebay {name}" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "drivebay: error: no command 'nosuch'\nhint: 'drivebay --help' lists the commands\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InUse("busy", hint="wait"), 1),
        (HostError("can't", 13), 1),
        (UsageError("no"), 2),
        (Unreachable("gone", hint="start it"), 3),
    ],
)
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(error) == code  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"drivebay: error: {error}\n")
    hint = getattr(error, "hint", None)
    assert ("hint: " in printed.err) == (hint is not None)


def test_help_imports_no_command() -> None:
    script = (
        "import sys; from drivebay.cli.main import main; main(['--help']);"
        "print(*(name for name in sys.modules if name.startswith('drivebay.')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    loaded = set(done.stderr.split())
    assert loaded == {"drivebay.cli", "drivebay.cli.main", "drivebay.cli.output", "drivebay.errors"}


def test_a_reader_that_has_gone_is_no_crash() -> None:
    script = (
        "import sys; sys.stdin.read();"
        "from drivebay.cli.main import main; sys.exit(main(['--help']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdin, process.stderr:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main, "_dispatch", interrupted)
    assert main(["bench"]) == 130


def test_each_summary_fits_a_terminal() -> None:
    assert all(len(command.summary) <= 64 for command in COMMANDS.values())
    assert all(isinstance(command, Command) for command in COMMANDS.values())


def test_json_is_readable_and_keeps_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "büro", "list": [1]})
    printed = capsys.readouterr().out
    assert "büro" in printed
    assert json.loads(printed) == {"name": "büro", "list": [1]}


def test_tables_align_numbers_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "n"), [("a", 5), ("longer", 10)])
    assert capsys.readouterr().out == "name     n\na        5\nlonger  10\n"


def test_an_empty_table_has_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "n"), [])
    assert capsys.readouterr().out == "name  n\n"
