"""vm/guest_image.py with stand-ins for apt and dpkg: what is kept, made once, or refused.

The end-to-end tests use the real ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import HostError, NotFound
from drivebay.vm.guest_image import prepare_guest

KNOWN = """Package: linux-image-cloud-amd64
Version: 6.1.9-1
Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)

Package: busybox-static
Version: 1:1.35.0-4
"""
UNPACK = """
mkdir -p "$3/boot" "$3/usr/bin" "$3/lib/modules/6.1.0-9"
echo kernel > "$3/boot/vmlinuz-6.1.0-9"
echo busybox > "$3/usr/bin/busybox"
"""


class Tools:
    """Stand-ins on PATH; each call leaves a line in ``called``."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.called = folder / "called"
        self.put("apt-cache", f"cat <<'END'\n{KNOWN}END\n")
        self.put("apt-get", "touch kernel.deb busybox.deb")
        self.put("dpkg-deb", UNPACK)

    def put(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.called}\n{text}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        return [line for line in self.called.read_text().splitlines() if line.startswith(name)]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Tools(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/bin:/usr/bin")
    return found


@pytest.fixture
def guests(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "drivebay" / "guests"


def made(guests: Path) -> list[str]:
    return sorted(path.name for path in guests.iterdir() if path.name != "lock")


def test_the_versions_that_apt_names_are_downloaded_once(tools: Tools, guests: Path) -> None:
    said: list[str] = []
    first, second = prepare_guest(said.append), prepare_guest(said.append)
    assert first == second
    assert first.version == "6.1.0-9"
    assert first.kernel.read_text() == "kernel\n"
    assert made(guests) == ["linux-image-6.1.0-9-cloud-amd64_6.1.9-1+busybox-static_1_1.35.0-4"]
    (download,) = tools.calls("apt-get")
    assert download.endswith(
        "download linux-image-6.1.0-9-cloud-amd64=6.1.9-1 busybox-static=1:1.35.0-4"
    )
    assert said == ["downloading linux-image-6.1.0-9-cloud-amd64 and busybox-static"]


def test_without_package_lists_what_is_there_serves(tools: Tools) -> None:
    before = prepare_guest(print)
    tools.put("apt-cache", "echo 'N: Unable to locate package' >&2; exit 100")
    assert prepare_guest(print) == before


def test_without_lists_and_without_a_guest_the_hint_is_the_line_to_type(tools: Tools) -> None:
    tools.put("apt-cache", "exit 100")
    with pytest.raises(NotFound, match="apt knows no package 'linux-image-cloud-amd64'") as caught:
        prepare_guest(print)
    assert str(caught.value.hint).startswith("sudo apt-get update")


def test_a_failed_download_says_why_and_leaves_nothing(tools: Tools, guests: Path) -> None:
    tools.put("apt-get", "echo 'E: Failed to fetch it' >&2; exit 100")
    with pytest.raises(HostError, match="apt-get said: E: Failed to fetch it"):
        prepare_guest(print)
    assert made(guests) == []


@pytest.mark.parametrize(
    ("unpack", "complaint"),
    [
        ("echo 'no space' >&2; exit 2", "dpkg-deb said: no space"),
        ('mkdir -p "$3/boot"', "hold no kernel, modules or busybox"),
    ],
)
def test_a_half_unpacked_guest_is_never_kept(
    tools: Tools, guests: Path, unpack: str, complaint: str
) -> None:
    tools.put("dpkg-deb", unpack)
    with pytest.raises((HostError, NotFound), match=complaint):
        prepare_guest(print)
    assert made(guests) == []
    tools.put("dpkg-deb", UNPACK)
    assert prepare_guest(print).busybox.read_text() == "busybox\n"
