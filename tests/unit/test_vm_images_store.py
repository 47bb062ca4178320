"""Images in their folder: added at once or not at all, seen when changed, and who uses them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.disks.inventory import Disk, Inventory
from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.vm.images.store import WHOLE, Image, ImageFacts, Images
from drivebay.vm.images.users import bdev_parameters, refuse_used, users_of

MIB = 1 << 20
FACTS = ImageFacts("/srv/a.raw", "Debian 12", "debian", True)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path / "images")


def add(images: Images, name: str = "a", content: bytes = b"x" * 1000) -> Image:
    with images.workspace() as work:
        raw = work / "disk"
        raw.write_bytes(content)
        return images.add(name, raw, FACTS)


def test_an_image_is_read_only_padded_and_known_again(images: Images) -> None:
    made = add(images)
    assert made.path == images.folder / "a" / "image.raw"
    assert made.path.stat().st_mode & 0o777 == 0o444
    assert (made.size, made.virtual_size, made.path.stat().st_size) == (WHOLE, 1000, WHOLE)
    assert made.path.read_bytes() == (b"x" * 1000).ljust(WHOLE, b"\0")
    assert images.all() == [images.get("a")] == [made]
    assert (made.facts, made.bdev) == (FACTS, "image-a")
    assert sorted(path.name for path in images.folder.iterdir()) == [".lock", "a"]
    made.check_unchanged()
    images.verify(made)


def test_what_is_unknown_stays_unknown(images: Images) -> None:
    with images.workspace() as work:
        raw = work / "disk"
        raw.write_bytes(b"x")
        made = images.add("a", raw, ImageFacts("b"))
    assert made.facts == images.get("a").facts == ImageFacts("b", "", None, None)


def test_a_name_is_given_once_and_nothing_is_left(images: Images) -> None:
    add(images)
    with pytest.raises(AlreadyExists, match="image 'a' already"):
        add(images, content=b"other")
    assert images.get("a").path.read_bytes()[:5] == b"xxxxx"
    assert sorted(path.name for path in images.folder.iterdir()) == [".lock", "a"]


def test_the_name_may_be_taken_while_an_image_is_made(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([None])

    def check_free(self: Images, name: str) -> None:
        if next(looks, "taken") == "taken":
            raise AlreadyExists("there is one")

    monkeypatch.setattr(Images, "check_free", check_free)
    with pytest.raises(AlreadyExists, match="there is one"):
        add(images)
    assert images.names() == []


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".a", "-a", "a b", "é", "a\n", "x" * 41, "a\0", "$(x)"]
)
def test_odd_names_are_refused(images: Images, name: str) -> None:
    for refused in (images.get, images.check_free):
        with pytest.raises(UsageError, match="can't be the name of an image"):
            refused(name)


def test_an_image_that_is_not_there_is_named(images: Images) -> None:
    assert (images.names(), images.all()) == ([], [])
    with pytest.raises(NotFound, match="there is no image 'a'"):
        images.get("a")


# ---- changes ------------------------------------------------------------------------------------


def overwrite(image: Image, content: bytes) -> None:
    image.path.chmod(0o600)
    image.path.write_bytes(content)


def test_a_changed_file_is_seen_at_once_and_by_its_content(images: Images) -> None:
    made = add(images)
    before = made.path.read_bytes()
    overwrite(made, b"y" + before[1:])
    with pytest.raises(StateError, match="image 'a' was changed") as caught:
        made.check_unchanged()
    assert caught.value.hint is not None
    assert "drivebay image check a" in caught.value.hint
    with pytest.raises(StateError, match="its checksum is"):
        images.verify(made)
    with pytest.raises(StateError, match="was changed"):
        images.get("a").check_unchanged()


def test_a_file_with_another_time_but_the_same_content_is_the_image_again(images: Images) -> None:
    made = add(images)
    copy = made.path.with_name("copy")
    copy.write_bytes(made.path.read_bytes())
    copy.rename(made.path)
    with pytest.raises(StateError, match="its file was replaced"):
        made.check_unchanged()
    images.verify(made)
    images.get("a").check_unchanged()


def test_a_changed_size_is_seen_even_at_the_same_time(images: Images) -> None:
    made = add(images)
    made.path.chmod(0o600)
    os.truncate(made.path, 2 * WHOLE)
    os.utime(made.path, ns=(made.mtime_ns, made.mtime_ns))
    with pytest.raises(StateError, match="was changed"):
        made.check_unchanged()
    with pytest.raises(StateError, match="its checksum is"):
        images.verify(made)


def test_a_file_that_is_gone_is_said(images: Images) -> None:
    made = add(images)
    made.path.unlink()
    with pytest.raises(HostError, match="No such file") as caught:
        made.check_unchanged()
    assert caught.value.errno == errno.ENOENT


def test_the_checksum_is_of_what_is_read_not_of_how_it_lies(images: Images) -> None:
    data = b"x" * MIB + bytes(3 * MIB) + b"y" * 10
    with images.workspace() as work:
        sparse = work / "sparse"
        with sparse.open("wb") as file:
            file.write(b"x" * MIB)
            file.seek(4 * MIB)
            file.write(b"y" * 10)
        holed = images.add("sparse", sparse, FACTS)
    plain = add(images, "plain", data)
    assert plain.checksum == holed.checksum
    moved = add(images, "moved", bytes(MIB) + b"x" * MIB + bytes(2 * MIB) + b"y" * 10)
    longer = add(images, "longer", data + bytes(WHOLE))
    assert len({plain.checksum, moved.checksum, longer.checksum}) == 3


def test_a_grown_image_reads_zeroes_and_is_unchanged(images: Images) -> None:
    made = add(images)
    grown = images.grow(made, 3 * WHOLE)
    assert images.get("a") == grown
    assert (grown.size, grown.path.stat().st_size) == (3 * WHOLE, 3 * WHOLE)
    assert grown.path.stat().st_mode & 0o777 == 0o444
    grown.check_unchanged()
    images.verify(grown)
    for size in (WHOLE, 3 * WHOLE, 4 * WHOLE + 1):
        with pytest.raises(UsageError, match="has 12 MiB: its new size"):
            images.grow(grown, size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no toml at all", "is not TOML"),
        ("size = 1048576", "has no good 'origin'"),
        ("{size}1", "has a size or uuid"),
        ("{text}cloud_init = 'yes'", "is not TOML|has no good 'cloud_init'"),
    ],
)
def test_a_broken_image_toml_is_said(images: Images, text: str, message: str) -> None:
    made = add(images)
    path = made.path.with_name("image.toml")
    whole = path.read_text()
    if text.startswith("{size}"):
        text = whole.replace(f"size = {WHOLE}\n", f"size = {MIB}\n", 1)
    elif text.startswith("{text}"):
        text = whole.replace("cloud_init = true", "cloud_init = 'yes'")
    path.write_text(text)
    with pytest.raises(StateError, match=message):
        images.get("a")


# ---- crashes ------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from drivebay.vm.images.store import Images
with Images(Path(sys.argv[1])).workspace() as work:
    (work / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(images: Images) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(images.folder)], check=False)
    left = list(images.folder.glob(".new-*"))
    assert len(left) == 1
    with images.workspace() as first:
        assert not left[0].exists()
        with images.workspace() as second:
            assert first.is_dir()
            assert second.is_dir()
    assert list(images.folder.glob(".new-*")) == []


def test_a_failure_while_an_image_is_made_leaves_nothing(images: Images) -> None:
    with pytest.raises(KeyboardInterrupt), images.workspace():
        raise KeyboardInterrupt
    assert [path.name for path in images.folder.iterdir()] == [".lock"]


def test_a_deleted_image_is_gone(images: Images) -> None:
    add(images)
    images.delete("a", lambda: None)
    assert [path.name for path in images.folder.iterdir()] == [".lock"]
    with pytest.raises(NotFound):
        images.delete("a", lambda: None)


def test_an_image_that_is_not_released_stays(images: Images) -> None:
    made = add(images)
    held = []

    def refuse() -> None:
        lock = os.open(images.folder / ".lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append("all names")
        finally:
            os.close(lock)
        raise InUse("somebody reads from it")

    with pytest.raises(InUse, match="somebody reads"):
        images.delete("a", refuse)
    assert held == ["all names"]
    images.get("a").check_unchanged()
    assert made.path.exists()


# ---- users --------------------------------------------------------------------------------------

VM = """uuid = "u"
machine = "q35"
memory = "1G"
cpus = 1
image = "{image}"
[[disk]]
name = "system"
{disk}
"""


def write_vm(vms: Path, name: str, image: str, disk: str) -> None:
    (vms / name).mkdir(parents=True)
    (vms / name / "vm.toml").write_text(VM.format(image=image, disk=disk))


CLONE = 'bdev = "default/web"\nmade = true'
OVERLAY = 'overlay = "system.qcow2"'


def volume(name: str, **more: object) -> Disk:
    plain = Disk(name, f"uuid-{name}", (f"p/{name}",), "thin", "p", MIB, 512)
    return replace(plain, **more)  # type: ignore[arg-type]


def test_without_a_target_a_vm_counts_that_has_a_disk_of_the_image(
    images: Images, tmp_path: Path
) -> None:
    made, vms = add(images), tmp_path / "vms"
    assert users_of(made, None, vms) == []
    write_vm(vms, "clone", "a", CLONE)
    write_vm(vms, "overlay", "a", OVERLAY)
    write_vm(vms, "other", "b", CLONE)
    write_vm(vms, "own-disk", "a", 'bdev = "mine"')
    assert users_of(made, None, vms) == ["VM 'clone'", "VM 'overlay'"]


def test_a_vm_that_can_not_be_read_may_use_the_image_it_mentions(
    images: Images, tmp_path: Path
) -> None:
    made, vms = add(images, "deb"), tmp_path / "vms"
    write_vm(vms, "broken", "deb", "what = 1")
    write_vm(vms, "broken-too", "other", "what = 1")
    assert users_of(made, None, vms) == ["perhaps VM 'broken' (its vm.toml can't be understood)"]


def test_a_target_shows_clones_made_by_hand_and_clones_of_clones(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    made, vms = add(images), tmp_path / "drivebay" / "vms"
    write_vm(vms, "independent-by-now", "a", CLONE)
    write_vm(vms, "overlay", "a", OVERLAY)
    inventory = Inventory(
        (),
        (
            volume("direct", external=made.uuid),
            volume("s@1", external=made.uuid, snapshot=True),
            volume("s", parent="s@1"),
            volume("t", parent="s@1"),
            volume("kept@1", external=made.uuid, snapshot=True),
            volume("elsewhere", external="9ee8d4bc-5d26-41ab-9a0b-1c8f4d4e4f0c"),
            volume("plain"),
        ),
    )
    users = users_of(made, inventory, vms)
    assert users == [f"disk 'p/{name}'" for name in ("direct", "kept@1", "s", "t")] + [
        "VM 'overlay'"
    ]
    with pytest.raises(InUse, match="can't be deleted: disk 'p/direct', .*VM 'overlay' read"):
        refuse_used(made, inventory, [], "deleted")


def test_a_bdev_with_another_uuid_is_known_by_its_file(images: Images) -> None:
    made = add(images)
    bdev = Disk("image-a", "image-a", ("other",), "file", None, MIB, 512, place=str(made.path))
    clone = volume("c", external="other")
    assert users_of(made, Inventory((), (bdev, clone)), made.path) == ["disk 'p/c'"]


def test_disks_whose_beginning_is_not_open_may_need_the_image(
    images: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    made = add(images)
    bdev = Disk("image-a", "image-a", (made.uuid,), "file", None, MIB, 512, place=str(made.path))
    with pytest.raises(InUse, match="what the disks 'p/c' begin with is not open") as caught:
        refuse_used(made, Inventory((), ()), ["p/c"], "deleted")
    assert caught.value.hint is not None
    assert json.dumps(bdev_parameters(made)) in caught.value.hint
    refuse_used(made, Inventory((), (bdev,)), ["p/c"], "deleted")  # so they need another one
    refuse_used(made, None, [], "deleted")
    with pytest.raises(DrivebayError, match="shows 'image-a'"):
        refuse_used(made, Inventory((), (replace(bdev, claimed=True),)), [], "deleted")
