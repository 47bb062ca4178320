"""The images that can be pulled: the list, lists of checksums, and pulling from a mirror."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from drivebay.cli.completion import candidates
from drivebay.cli.main import main
from drivebay.errors import NotFound, StateError
from drivebay.vm.images import download
from drivebay.vm.images.catalogue import cloud_image, cloud_images, find_checksum
from drivebay.vm.images.store import Images
from tests.fakes.web_server import WebServer

pytestmark = pytest.mark.usefixtures("own_folders")

CONTENT = random.Random(9).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_the_catalogue_is_sound() -> None:
    assert {"debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04", "almalinux-9",
            "almalinux-10", "openeuler-24.03"} <= set(cloud_images())  # fmt: skip
    assert any(name.startswith("fedora-") for name in cloud_images())
    for image in cloud_images().values():
        Images().check_free(image.name)
        for url in (image.image, image.checksums):
            download.check_url(url)
            assert url.startswith("https://")
        assert image.kind in ("sha256", "sha512")
    with pytest.raises(NotFound, match="'dos-6' is none of the images") as caught:
        cloud_image("dos-6")
    assert "debian-13" in str(caught.value.hint)


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    "text",
    [
        f"{A}  x.img\n{B}  y.img\n",
        f"{A.upper()} *x.img\r\n",
        f"-----BEGIN PGP SIGNED MESSAGE-----\n# x.img: 5 bytes\nSHA256 (x.img) = {A}\n",
        f"{A}  ./x.img\n{A}  x.img\n",
    ],
)
def test_lists_of_checksums(text: str) -> None:
    assert find_checksum(text, "x.img", "sha256") == A


@pytest.mark.parametrize(
    "text",
    [
        "", "<html>", f"{A}  x_img\n", f"{A}  dir/x.img\n", f"{A[:-1]}  x.img\n",
        f"{A}0  x.img\n", f"{A} x.img.old\n", f"{A}  x.img\n{B}  x.img\n", f"SHA512 (x.img) = {A}",
        f" {A}  x.img", f"g{A[1:]}  x.img",
    ],
)  # fmt: skip
def test_lists_that_do_not_name_the_file_once(text: str) -> None:
    with pytest.raises(StateError, match="the list of checksums has"):
        find_checksum(text, "x.img", "sha256")


@pytest.mark.parametrize("by", ["option", "setting"])
def test_an_image_is_pulled_from_a_mirror_and_verified(
    web_server: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    by: str,
) -> None:
    raw = tmp_path / "x.raw"
    raw.write_bytes(CONTENT)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, f"{raw}.q"], check=True)
    content = Path(f"{raw}.q").read_bytes()
    folder = "/mirror/images/cloud/bookworm/latest"
    web_server.files[f"{folder}/debian-12-genericcloud-amd64.qcow2"] = content
    digest = hashlib.sha512(content).hexdigest()
    listed = f"{digest}  debian-12-genericcloud-amd64.qcow2\n".encode()
    web_server.files[f"{folder}/SHA512SUMS"] = listed.replace(digest[:1].encode(), b"?")
    mirror = f"{web_server.address}/mirror"
    if by == "setting":
        monkeypatch.setenv("DRIVEBAY_IMAGE_MIRROR", f"{mirror}/")
    words = ["image", "pull", "debian-12", "--as", "deb"]
    words += ["--mirror", mirror] if by == "option" else []
    assert main(words) == 1
    assert "has no SHA512 of" in capsys.readouterr().err
    web_server.files[f"{folder}/SHA512SUMS"] = listed
    assert main([*words, "--dry-run"]) == 0
    assert Images().names() == []
    assert main(words) == 0
    image = Images().get("deb")
    assert (image.facts.os, image.facts.user) == ("Debian 12 (bookworm)", "debian")
    assert image.facts.cloud_init is True
    assert (
        image.facts.origin
        == f"{mirror}{folder.removeprefix('/mirror')}/debian-12-genericcloud-amd64.qcow2"
    )
    assert image.path.read_bytes()[: len(CONTENT)] == CONTENT


def test_a_url_becomes_an_image_whose_origin_has_no_secret(web_server: WebServer) -> None:
    web_server.files["/d/my%20disk.raw?key=secret"] = CONTENT
    url = web_server.address.replace("//", "//me:secret@") + "/d/my disk.raw?key=secret"
    assert main(["image", "import", url.replace(" ", "%20"), "--sha256", SHA256]) == 0
    image = Images().get("my-disk")
    assert image.facts.origin == f"{web_server.address}/d/my%20disk.raw"
    assert "secret" not in image.path.with_name("image.toml").read_text()


def test_a_web_page_in_place_of_an_image_is_said(
    web_server: WebServer, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.files["/login"] = b"<!DOCTYPE html><title>Log in</title>"
    assert main(["image", "import", f"{web_server.address}/login"]) == 2
    assert "'login' is a web page" in capsys.readouterr().err


def test_a_file_url_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "b c.raw").write_bytes(CONTENT)
    assert main(["image", "import", f"file://{tmp_path}/b%20c.raw", "-q"]) == 0
    assert Images().names() == ["b-c"]


def test_names_are_completed(tmp_path: Path) -> None:
    assert "debian-13" in candidates(["image", "pull", "deb"])
    assert candidates(["image", "delete", ""]) == []
    assert main(["image", "create", "empty", "--size", "4M", "-q"]) == 0
    assert candidates(["image", "delete", "e"]) == ["empty"]
