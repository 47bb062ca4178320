"""net/scripts.py: a person's own ifup scripts, real ones: which may be run, what went wrong."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, StateError, UsageError
from drivebay.net import scripts
from drivebay.system.processes import start_ticks
from tests.fakes.process import wait_until

Script = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str, mode: int = 0o755, name: str = "ifup") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        path.chmod(mode)
        return path

    return write


def refused(path: Path | str, limit: float = 30.0) -> DrivebayError:
    with pytest.raises(DrivebayError) as caught:
        scripts.run(str(path), "tap1", "web", limit)
    return caught.value


def test_a_script_gets_the_interfaces_name_and_no_terminal(script: Script, tmp_path: Path) -> None:
    path = script(f'#!/bin/sh\necho "$# $1 $(cat)" > {tmp_path}/seen\n')
    scripts.run(str(path), "tap1", "web")
    assert (tmp_path / "seen").read_text() == "1 tap1 \n"


def test_what_a_script_leaves_behind_is_not_waited_for(script: Script, tmp_path: Path) -> None:
    path = script(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid\n")
    scripts.run(str(path), "tap1", "web", 20.0)
    left = int((tmp_path / "pid").read_text())
    os.kill(left, 9)  # it is there, or this raises


# ---- before it runs -----------------------------------------------------------------------------


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    error = refused(tmp_path / "none")
    assert str(error) == f"there is no script '{tmp_path}/none'"
    (tmp_path / "link").symlink_to("nowhere")
    assert "is a link to 'nowhere', which is not there" in str(refused(tmp_path / "link"))


def test_a_script_is_named_with_its_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    error = refused("lib/ifup")
    assert isinstance(error, UsageError)
    assert error.hint == "script=/usr/lib/ifup"


def test_a_folder_is_no_script(tmp_path: Path) -> None:
    assert "is no file" in str(refused(tmp_path))


def test_a_loop_of_links_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert isinstance(refused(tmp_path / "a"), HostError)


def test_a_script_that_is_not_executable_is_mended_by_755(script: Script) -> None:
    path = script("#!/bin/sh\n", 0o644)
    error = refused(path)
    assert "is not executable for this user (mode 644)" in str(error)
    assert error.hint == f"chmod 755 {path}"


def test_on_a_file_system_without_execution_chmod_is_not_the_mend(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script("#!/bin/sh\n")
    noexec = os.statvfs_result((0, 0, 0, 0, 0, 0, 0, 0, os.ST_NOEXEC, 255))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: noexec)
    error = refused(path)
    assert "(noexec)" in str(error)
    assert error.hint is not None
    assert "chmod" not in error.hint


@pytest.mark.parametrize(
    ("text", "cause", "mend"),
    [
        ("ip link set $1 up\n", "does not say which program reads it", "1i #!/bin/sh"),
        ("", "does not say which program reads it", "1i #!/bin/sh"),
        ("#!/bin/sh\r\nexit 0\r\n", "has the line ends of Windows, so '/bin/sh' is", r"s/\r$//"),
        ("#!/nowhere/bash -e\n", "read by '/nowhere/bash', which is not there", "install that"),
        ("#!/etc/passwd\n", "read by '/etc/passwd', which can't be executed", "install that"),
        ("#!bash\n", "its interpreter with the whole path, and says 'bash'", "#!/bin/sh"),
        ("#!\n", "its interpreter with the whole path, and says ''", "#!/bin/sh"),
        ("#!\x1b[2Jsh\n", "and says 'sh'", "#!/bin/sh"),
    ],
)
def test_a_first_line_that_the_kernel_would_refuse(
    script: Script, text: str, cause: str, mend: str
) -> None:
    error = refused(script(text))
    assert isinstance(error, StateError)
    assert cause in str(error)
    assert mend in (error.hint or "")


def test_a_program_needs_no_first_line(tmp_path: Path) -> None:
    (tmp_path / "true").write_bytes(Path("/bin/true").read_bytes())
    (tmp_path / "true").chmod(0o755)
    scripts.run(str(tmp_path / "true"), "tap1", "web")


# ---- what root does not run ---------------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.parametrize(("mode", "who"), [(0o757, "everybody"), (0o777, "everybody"),
                                           (0o775, "group 0")])  # fmt: skip
def test_a_script_that_others_may_write(script: Script, mode: int, who: str) -> None:
    path = script("#!/bin/sh\n", mode)
    error = refused(path)
    assert str(error) == (
        f"root does not run the script '{path}': writable by {who} (mode {mode:o})"
    )
    assert error.hint == f"chmod 755 {path}"


@pytest.mark.needs_root
def test_a_script_of_another_user(script: Script) -> None:
    path = script("#!/bin/sh\n")
    os.chown(path, pwd.getpwnam("games").pw_uid, 0)
    error = refused(path)
    assert "writable by its owner, user" in str(error)
    assert error.hint == f"sudo install -o root -g root -m 755 {path} /usr/local/sbin/"


@pytest.mark.needs_root
def test_a_folder_above_in_which_others_may_write(tmp_path: Path) -> None:
    (tmp_path / "open" / "in").mkdir(parents=True)
    path = tmp_path / "open" / "in" / "ifup"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    (tmp_path / "open").chmod(0o777)
    error = refused(path)
    assert f"since '{tmp_path}/open' is writable by everybody (mode 777)" in str(error)
    (tmp_path / "open").chmod(0o1777)  # as /tmp: what is root's stays there
    scripts.run(str(path), "tap1", "web")


@pytest.mark.needs_root
def test_a_link_that_others_may_replace(tmp_path: Path, script: Script) -> None:
    good = script("#!/bin/sh\n")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "ifup").symlink_to("../ifup")
    (tmp_path / "first").symlink_to(folder / "ifup")
    scripts.run(str(tmp_path / "first"), "tap1", "web")
    os.chown(folder, pwd.getpwnam("games").pw_uid, 0)
    scripts.run(str(good), "tap1", "web")
    assert f"since '{folder}' is writable by its owner" in str(refused(tmp_path / "first"))


@pytest.mark.needs_root
def test_an_interpreter_that_others_may_write(tmp_path: Path, script: Script) -> None:
    (tmp_path / "sh").write_bytes(Path("/bin/sh").read_bytes())
    (tmp_path / "sh").chmod(0o777)
    path = script(f"#!{tmp_path}/sh\n")
    assert f"'{path}', which is read by '{tmp_path}/sh': writable by" in str(refused(path))


def test_a_plain_user_runs_what_is_his(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    scripts.run(str(script("#!/bin/sh\n", 0o777)), "tap1", "web")


# ---- how it ended -------------------------------------------------------------------------------


def test_a_script_that_fails_is_quoted_with_its_exit_code(script: Script) -> None:
    path = script(
        "#!/bin/sh\nfor n in 1 2 3 4 5 6; do echo line $n; done\n"
        "printf 'no bridge \\033[2Jbr7\\r\\n' >&2\nexit 1\n"
    )
    error = refused(path)
    assert str(error) == (
        f"'{path}' for tap1 of VM 'web' ended with exit code 1; it said:\n"
        "    line 3\n    line 4\n    line 5\n    line 6\n    no bridge br7"
    )
    assert error.hint == f"try it: {path} tap1; echo $?"


def test_a_script_that_fails_without_a_word(script: Script) -> None:
    path = script("#!/bin/sh\nexit 7\n")
    assert str(refused(path)) == f"'{path}' for tap1 of VM 'web' ended with exit code 7"


def test_only_the_end_of_a_flood_is_kept(script: Script) -> None:
    path = script("#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x\necho\necho end\nexit 2\n")
    words = str(refused(path))
    assert words.endswith("\n    end")
    assert len(words) < 2500


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_a_script_that_a_signal_ends(script: Script, number: int, name: str) -> None:
    path = script(f"#!/bin/sh\nkill -{number} $$\n")
    assert f"was ended by {name}" in str(refused(path))


def test_a_script_that_does_not_end_is_ended_with_its_children(
    script: Script, tmp_path: Path
) -> None:
    path = script(f"#!/bin/sh\necho waiting\nsleep 300 &\necho $! > {tmp_path}/pid\nwait\n")
    error = refused(path, 0.5)
    assert "was not done after 0 seconds, and was ended; it said:\n    waiting" in str(error)
    left = int((tmp_path / "pid").read_text())
    wait_until(lambda: start_ticks(left) is None, "the end of its child", 20)
