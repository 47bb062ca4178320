"""vm/password.py: hashed by the real openssl, asked for on a real terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from drivebay.errors import HostError, StateError, UsageError
from drivebay.vm.password import hash_password, read_password
from drivebay.vm.seed import check_cloud_init
from drivebay.vm.spec import CloudInit


def same(password: str, hashed: str) -> bool:
    """Whether a hash is that of a password, by giving openssl the hash's own salt."""
    salt = hashed.split("$")[2]
    done = subprocess.run(
        ["openssl", "passwd", "-6", "-salt", salt, "-stdin"],
        input=password + "\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip() == hashed


@pytest.mark.parametrize("password", ["secret", "-6 $x 'y\" z", "grüß dich", "x" * 256])
def test_a_hash_is_of_its_password(password: str) -> None:
    hashed = hash_password(password)
    assert same(password, hashed)
    assert not same(password[:-1], hashed)
    assert hash_password(password) != hashed  # each has its own salt
    check_cloud_init(CloudInit("drivebay-1", "web", password_hash=hashed))


@pytest.mark.parametrize("password", ["", "a\nb", "a\0b", "x" * 257, "é" * 129])
def test_a_password_that_would_not_be_the_same_later_is_refused(password: str) -> None:
    with pytest.raises(UsageError):
        hash_password(password)


def test_a_missing_openssl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="no openssl") as caught:
        hash_password("secret")
    assert "apt install openssl" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["geheim ß", "geheim ß\n", "geheim ß\r\nmore\n"])
def test_a_file_has_it_in_its_first_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "p").write_bytes(content.encode())
    assert read_password(tmp_path / "p") == "geheim ß"


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="can't read a password from"):
        read_password(tmp_path / "absent")
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_password(tmp_path / "p")


PROGRAM = """
from drivebay.errors import DrivebayError
from drivebay.vm.password import read_password
try:
    print("got", read_password(None))
except DrivebayError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    ("again", "said"), [("geheim", "got geheim"), ("gehiem", "error: the two passwords differ")]
)
def test_a_terminal_is_asked_twice_and_shows_nothing(again: str, said: str) -> None:
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM], timeout=20, encoding="utf-8")
    child.delaybeforesend = None
    for prompt, typed in (("password of the guest's user: ", "geheim"), ("once more: ", again)):
        child.expect_exact(prompt)
        child.waitnoecho()
        child.sendline(typed)
    child.expect_exact(said)
    assert child.before is not None
    assert typed not in child.before
    child.close(force=True)


def test_nobody_can_be_asked_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StateError, match="without a terminal"):
        read_password(None)
