"""vm/vnc.py and cli/vm_vnc.py: a port for VNC programs, and what keeps others from it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from drivebay.cli.vm_vnc import read_vnc, vnc_words
from drivebay.errors import HostError, InUse, UsageError
from drivebay.vm import ports
from drivebay.vm.spec import Forward, NetSpec, VncSpec
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import Vm
from drivebay.vm.vnc import CERTIFICATES, check_certificates, read_address, read_password
from tests.unit.vm_world import bare

LOCAL = VncSpec("127.0.0.1", 5901)


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("secret12\nnot this\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    for name in CERTIFICATES:
        (tmp_path / name).write_text("a certificate")
    return tmp_path


@pytest.fixture(autouse=True)
def all_ports_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_opens", lambda address, port: True)


def said(
    vnc: str | None = None, password: Path | str | None = None, tls: Path | str | None = None
) -> argparse.Namespace:
    return argparse.Namespace(
        vnc=vnc,
        vnc_password_file=None if password is None else str(password),
        vnc_tls=None if tls is None else str(tls),
    )


def another(name: str, **changed: object) -> Vm:
    return Vm(Path(), bare(name, **changed), "")


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("", "127.0.0.1", None),
        (":5999", "127.0.0.1", 5999),
        ("0.0.0.0", "0.0.0.0", None),
        ("192.0.2.1:5900", "192.0.2.1", 5900),
        ("::1", "::1", None),
        ("[::1]", "::1", None),
        ("[2001:DB8::1]:6000", "2001:db8::1", 6000),
    ],
)
def test_an_address_is_read(text: str, address: str, port: int | None) -> None:
    assert read_address(text) == (address, port)


@pytest.mark.parametrize(
    "text",
    ["localhost", "0.0.0.0:", "0.0.0.0:x", "[::1", "[::1]5900", "1.2.3", "0.0.0.0:٣", "a,b:1",
     "127.0.0.1:123456", "web"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address for VNC"):
        read_address(text)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_this_host_alone_needs_neither_password_nor_certificates(address: str) -> None:
    text = write_spec(bare("web", vnc=VncSpec(address, 5901)))
    assert read_spec("web", text).vnc == VncSpec(address, 5901)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "::ffff:1.2.3.4"])
def test_other_machines_see_nothing_without_one_of_them(address: str) -> None:
    with pytest.raises(UsageError, match="nothing would keep them from the screen") as error:
        read_spec("web", write_spec(bare("web", vnc=VncSpec(address, 5901))))
    assert "--vnc-password-file" in str(error.value.hint)
    for vnc in (VncSpec(address, 5901, "/pw"), VncSpec(address, 5901, tls="/tls")):
        assert read_spec("web", write_spec(bare("web", vnc=vnc))).vnc == vnc


@pytest.mark.parametrize(
    ("vnc", "wrong"),
    [
        (VncSpec("localhost", 5901), "is no IP address"),
        (VncSpec("127.0.0.1", 5899), "takes 5900 to 65535"),
        (VncSpec("127.0.0.1", 65536), "takes 5900 to 65535"),
        (VncSpec("127.0.0.1", 5901, "pw"), "should begin with '/'"),
        (VncSpec("127.0.0.1", 5901, tls="tls"), "should begin with '/'"),
    ],
)
def test_a_wrong_table_is_refused(vnc: VncSpec, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        read_spec("web", write_spec(bare("web", vnc=vnc)))


def test_a_password_is_the_first_line_of_a_closed_file(password: Path) -> None:
    assert read_password(password) == b"secret12"
    for mode in (0o640, 0o604):
        password.chmod(mode)
        with pytest.raises(UsageError, match="other users may read the password") as error:
            read_password(password)
        assert error.value.hint == f"chmod 600 {password}"


@pytest.mark.parametrize("content", [b"", b"\nsecret", b"caf\xc3\xa9", b"a\x00b", b"\tx"])
def test_what_nobody_could_type_is_no_password(password: Path, content: bytes) -> None:
    password.write_bytes(content)
    with pytest.raises(UsageError, match="is no password"):
        read_password(password)


def test_files_that_are_not_there_are_named(tmp_path: Path, certificates: Path) -> None:
    check_certificates(certificates)
    (certificates / "server-key.pem").unlink()
    with pytest.raises(HostError, match=r"server-key.pem': No such file"):
        check_certificates(certificates)
    with pytest.raises(HostError, match=r"can't read '.*/none'"):
        read_password(tmp_path / "none")


def test_a_port_is_chosen_that_no_other_vm_has() -> None:
    others = [
        another("a", vnc=VncSpec("127.0.0.1", 5900)),
        another("b", nets=(NetSpec("user", "52:54:00:00:00:01", (Forward(5901, 22),)),)),
    ]
    assert read_vnc(said(""), None, others) == VncSpec("127.0.0.1", 5902)
    assert read_vnc(said("::1"), LOCAL, others[:1]) == VncSpec("::1", 5901)
    with pytest.raises(InUse, match="port 5900 leads to VM 'a' already") as error:
        read_vnc(said(":5900"), None, others)
    assert error.value.hint == "choose another, such as --vnc 127.0.0.1:5902"
    with pytest.raises(InUse, match="port 5901 leads to VM 'b' already"):
        read_vnc(said(":5901"), None, others)
    with pytest.raises(InUse, match="port 5900 leads to VM 'a' already"):
        ports.check_free([Forward(5900, 22)], others)


def test_what_is_not_said_stays_and_none_takes_it_away(password: Path, certificates: Path) -> None:
    assert read_vnc(said(), LOCAL, []) == LOCAL
    assert read_vnc(said(), None, []) is None
    both = read_vnc(said("0.0.0.0", password, certificates), LOCAL, [])
    assert both == VncSpec("0.0.0.0", 5901, str(password), str(certificates))
    assert read_vnc(said(tls="none"), both, []) == VncSpec("0.0.0.0", 5901, str(password))
    with pytest.raises(UsageError, match="nothing would keep them"):
        read_vnc(said(tls="none", password="none"), both, [])
    assert read_vnc(said("none"), both, []) is None
    with pytest.raises(UsageError, match="need --vnc"):
        read_vnc(said(password=password), None, [])
    with pytest.raises(UsageError, match="neither"):
        read_vnc(said("none", password), both, [])


def test_it_is_said_how_weak_a_password_is(
    password: Path, certificates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_vnc(said("", password), None, [])
    assert capsys.readouterr().err == (
        "drivebay: warning: VNC uses 8 characters of a password; what is seen and typed is not "
        "encrypted\n"
    )
    password.write_text("secret123")
    read_vnc(said("", password, certificates), None, [])
    assert capsys.readouterr().err == (
        "drivebay: warning: VNC uses 8 characters of a password, and this one has 9\n"
    )


def test_people_read_where_it_is() -> None:
    assert vnc_words(LOCAL) == "127.0.0.1:5901"
    full = VncSpec("::1", 5901, "/pw", "/tls")
    assert vnc_words(full) == "[::1]:5901, password in /pw, encrypted with /tls"
