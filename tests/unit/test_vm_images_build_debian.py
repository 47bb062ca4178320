"""vm/images/debian.py with a stand-in for mmdebstrap and apt; the end-to-end tests build one."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, NotFound, StateError, UsageError
from drivebay.vm.images import debian
from drivebay.vm.images.debian import Source, build_debian, machine_sources

MIRROR = "http://mirror.internal:3142/debian"
KNOWN = f"""\
Debian main bookworm bookworm {MIRROR}/
Debian main bookworm-updates bookworm-updates {MIRROR}/
Debian main oldstable-security bookworm-security {MIRROR}-security/
Debian main bookworm-backports bookworm-backports {MIRROR}/
Debian contrib bookworm bookworm {MIRROR}/
Docker stable bookworm bookworm https://download.docker.com/linux/debian/
 main bookworm $(CODENAME) https://example.com/debian/
"""
SETTINGS = """\
Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://proxy.internal:3142";
Acquire::http::Proxy::mirror.internal "DIRECT";
Acquire::Languages "";
Acquire::Check-Valid-Until "false";
"""
TALK = """
echo 'I: running apt-get update...'
echo 'I: extracting archives...'
echo '0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.'
echo 'Setting up dash (0.5) ...'; echo 'Setting up bash (5) ...'
echo 'I: installing remaining packages inside the chroot...'
echo '0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.'
echo 'Unpacking udev (252) ...'; echo 'Setting up udev (252) ...'
"""


class Tools:
    """Stand-ins on PATH, before the real ones."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.words = folder / "words"
        self.put("apt-get", f"cat <<'END'\n{KNOWN}END\n")
        self.put("apt-config", f"cat <<'END'\n{SETTINGS}END\n")
        self.mmdebstrap(TALK)

    def put(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def mmdebstrap(self, text: str) -> None:
        """It writes its words down, and the sources that it was given."""
        last = (
            f'for last in "$@"; do echo "$last"; done > {self.words}; cat "$last" >> {self.words}'
        )
        self.put("mmdebstrap", f"{last}\n{text}")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tools]:
    found = Tools(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(debian, "add_loaders", lambda raw: None)
    monkeypatch.setattr(debian, "_mode", lambda: "root")
    monkeypatch.setattr(
        "platform.freedesktop_os_release",
        lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"},
    )
    before = set(tmp_path.iterdir())
    yield found
    left = set(tmp_path.iterdir()) - before - {found.words, tmp_path / "work"}
    assert not left, "temporary files stay"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def test_only_debians_own_archives_of_this_release_count(tools: Tools) -> None:
    assert machine_sources("bookworm") == [
        Source(MIRROR, "bookworm"),
        Source(MIRROR, "bookworm-updates"),
        Source(f"{MIRROR}-security", "bookworm-security"),
    ]


def test_without_package_lists_the_hint_is_the_line_to_type(tools: Tools) -> None:
    tools.put("apt-get", "")
    with pytest.raises(NotFound, match="apt knows no archive of Debian bookworm") as caught:
        machine_sources("bookworm")
    assert caught.value.hint == "sudo apt-get update"


def test_mmdebstrap_gets_our_mirror_our_proxy_and_the_file_system(tools: Tools, work: Path) -> None:
    said: list[str] = []
    built = build_debian(work, said.append, packages=["fio"])
    assert built.raw.parent == work
    assert list(work.iterdir()) == [built.raw]
    assert built.facts.cloud_init
    assert built.facts.user == "debian"
    words = tools.words.read_text()
    assert ",qemu-guest-agent,fio\n" in words
    assert f"URIs: {MIRROR}\nSuites: bookworm\n" in words
    assert f"URIs: {MIRROR}-security\nSuites: bookworm-security\n" in words
    assert '--aptopt=Acquire::http::Proxy "http://proxy.internal:3142";\n' in words
    assert '--aptopt=Acquire::http::Proxy::mirror.internal "DIRECT";\n' in words
    assert "Languages" not in words
    # Its cleaning would use this machine's apt: our hook has removed what apt is told by.
    assert "\n--skip=cleanup\n" in words
    assert "-d . /proc/self/fd/" in words
    assert said == [
        "reading the mirror's lists",
        "unpacking the essential packages",
        "installing essential packages (20 %)",
        "installing essential packages (50 %)",
        "installing packages (50 %)",
        "installing packages (100 %)",
        "adding the boot loaders",
    ]


def test_another_suite_comes_from_the_same_mirror(tools: Tools, work: Path) -> None:
    build_debian(work, print, suite="trixie")
    words = tools.words.read_text()
    assert "\ntrixie\n/dev/null\n" in words
    assert "Suites: trixie-security\n" in words
    assert "Suites: bookworm" not in words


def test_the_guest_never_hears_of_the_building_machines_mirror() -> None:
    with tarfile.open(fileobj=io.BytesIO(debian._our_files("bookworm", "some-uuid"))) as archive:
        texts = {
            member.name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
        assert all((member.uid, member.gid) == (0, 0) for member in archive.getmembers())
    assert texts["etc/fstab"].startswith("UUID=some-uuid / ext4 ")
    assert (
        "root=UUID=some-uuid ro no_timer_check console=tty0 console=ttyS0"
        in texts["boot/grub/grub.cfg"]
    )
    assert "internal" not in "".join(texts.values())
    assert (
        "http://deb.debian.org/debian-security\nSuites: bookworm-security\n"
        in (texts["etc/apt/sources.list.d/debian.sources"])
    )


@pytest.mark.parametrize(
    ("talk", "complaint"),
    [
        ("echo 'E: Unable to locate package fioo'; echo 'E: apt-get failed'; exit 100",
         "said: Unable to locate package fioo"),
        ("echo 'mke2fs: no room'; echo 'E: setup failed: E: command failed: set -eu'; exit 25",
         "said: mke2fs: no room"),
        ("echo 'Killed'; exit 1", "said: Killed"),
        ("exit 1", "said: nothing"),
    ],
)  # fmt: skip
def test_a_failed_building_says_why_and_leaves_nothing(
    tools: Tools, work: Path, talk: str, complaint: str
) -> None:
    tools.mmdebstrap(talk)
    with pytest.raises(HostError, match=complaint):
        build_debian(work, print)
    assert not list(work.iterdir())


def test_ctrl_c_ends_mmdebstrap_which_cleans_up_first(
    tools: Tools, work: Path, tmp_path: Path
) -> None:
    """Its end is waited for: it has file systems mounted that it must take away itself."""
    tools.mmdebstrap(
        f"trap 'sleep 0.2; echo cleaned >> {tools.words}; exit 1' INT\n"
        "echo 'I: running apt-get update...'\n"
        "for turn in $(seq 200); do sleep 0.05; done"
    )

    def say(text: str) -> None:
        main = threading.main_thread().ident or 0
        threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_debian(work, say)
    assert time.monotonic() - began < debian.END_SECONDS / 2
    assert tools.words.read_text().endswith("cleaned\n")
    assert not list(work.iterdir())


def test_on_a_machine_that_is_not_debian_images_are_pulled(
    tools: Tools, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = {"ID": "fedora", "PRETTY_NAME": "Fedora Linux 42"}
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    with pytest.raises(StateError, match="the machine is Fedora Linux 42, not Debian") as caught:
        build_debian(work, print)
    assert caught.value.hint == "drivebay image pull debian-12"


@pytest.mark.parametrize(
    ("suite", "packages"),
    [("../../x", []), ("Bookworm", []), ("bookworm", ["fio,$(reboot)"]), ("bookworm", ["-o"])],
)
def test_odd_names_are_refused_before_anything_runs(
    tools: Tools, work: Path, suite: str, packages: list[str]
) -> None:
    with pytest.raises(UsageError):
        build_debian(work, print, suite=suite, packages=packages)
    assert not tools.words.exists()


def test_a_full_disk_is_noticed_before(
    tools: Tools, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "ROOM_TO_BUILD", 1 << 60)
    with pytest.raises(HostError, match="MiB are free: No space left"):
        build_debian(work, print)
    assert not tools.words.exists()


@pytest.mark.parametrize(
    ("newuidmap", "subuid", "complaint", "hint"),
    [
        (False, "", "without newuidmap", "apt-get install"),
        (True, "somebody:100000:65536\n", "has no numbers in /etc/sub[ug]id", "--add-subuids"),
    ],
)
def test_an_ordinary_user_hears_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    newuidmap: bool,
    subuid: str,
    complaint: str,
    hint: str,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 65534)
    if newuidmap:
        (tmp_path / "newuidmap").touch(0o755)
    monkeypatch.setattr(debian, "tools_environment", lambda: {"PATH": str(tmp_path)})
    monkeypatch.setattr(Path, "read_text", lambda path: subuid)
    with pytest.raises(DrivebayError, match=complaint) as caught:
        debian._mode()
    assert hint in str(caught.value.hint)
