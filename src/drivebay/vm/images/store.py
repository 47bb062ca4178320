"""The images that there are: DATA/images/NAME with image.raw, read-only, and image.toml.

Context: a short-lived process. VMs read from image.raw for as long as they live, so it never
changes: each start compares its size, time and inode with those in image.toml
(`Image.check_unchanged`), and `Images.verify` its content. An image is made in a folder
``.new-…`` beside the others and gets its name by one rename; a folder that a killed process
left is removed by the next one that adds an image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from drivebay.disks.places import data_folder
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, HostError, NotFound, StateError, UsageError

__all__ = [
    "WHOLE",
    "BuiltImage",
    "Image",
    "ImageFacts",
    "Images",
    "Report",
    "check_image_name",
    "host_errors",
    "quiet",
]

# A volume that begins with an image needs one of whole clusters; a pool's are of 4 MiB.
WHOLE: Final = 4 << 20

_MIB: Final = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", re.ASCII)
_UNFINISHED: Final = ".new-"

# What takes long says how far it is: what it does, and how much of how much is done.
Report = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image beside its content."""

    origin: str  # a file, a URL without credentials, or how it was built
    os: str = ""
    user: str | None = None  # whom cloud-init makes if it is told nothing
    cloud_init: bool | None = None  # None: unknown


@dataclass(frozen=True)
class BuiltImage:
    """A raw file that becomes an image."""

    raw: Path
    facts: ImageFacts


@dataclass(frozen=True)
class Image:
    """One image; the values are those of its image.toml."""

    name: str
    path: Path  # of image.raw
    facts: ImageFacts
    created: datetime
    uuid: str  # of the bdev on it: what its clones know it by
    size: int
    virtual_size: int  # before it was padded to WHOLE
    checksum: str
    mtime_ns: int
    inode: int

    @property
    def bdev(self) -> str:
        """The name of the read-only bdev on image.raw in a target."""
        return f"image-{self.name}"

    @property
    def used(self) -> int:
        """Bytes that it takes up. Raises: HostError."""
        return self._status().st_blocks * 512

    def check_unchanged(self) -> None:
        """Look at size, time and inode, which is quick. Raises: StateError, HostError."""
        status = self._status()
        found = (status.st_size, status.st_mtime_ns, status.st_ino)
        if found != (self.size, self.mtime_ns, self.inode):
            raise StateError(
                f"image '{self.name}' was changed since it was added, or its file was replaced: "
                "disks that were cloned from it may be damaged",
                hint=f"drivebay image check {self.name} compares its content",
            )

    def _status(self) -> os.stat_result:
        with host_errors(f"can't look at image '{self.name}'", self.path):
            return self.path.stat()


@contextlib.contextmanager
def host_errors(what: str, path: Path) -> Iterator[None]:
    """Turn what the operating system says into a HostError that says what failed."""
    try:
        yield
    except OSError as error:
        code = error.errno or errno.EIO
        hint = None
        if code == errno.ENOSPC:
            hint = f"df -h {path.parent}"
        elif code in (errno.EACCES, errno.EPERM):
            hint = f"ls -ld {path.parent} {path}"
        raise HostError(what, code, path=str(path), hint=hint) from error


def check_image_name(name: str) -> None:
    """Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name[:80]}' can't be the name of an image: 1 to 40 letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit"
        )


class Images:
    """The folder of all images."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = data_folder() / "images" if folder is None else folder

    def names(self) -> list[str]:
        """The names of all images, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.folder.iterdir()
            if _NAME.fullmatch(entry.name) and (entry / "image.toml").is_file()
        )

    def all(self) -> list[Image]:
        """All images. Raises: StateError when an image.toml can't be understood."""
        return [self.get(name) for name in self.names()]

    def get(self, name: str) -> Image:
        """The image of that name. Raises: NotFound, UsageError, StateError."""
        check_image_name(name)
        folder = self.folder / name
        try:
            text = (folder / "image.toml").read_text()
        except FileNotFoundError:
            raise NotFound(f"there is no image '{name}'", hint="drivebay image list") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StateError(f"can't read the image.toml of image '{name}': {error}") from error
        return _read_image(name, folder / "image.raw", text)

    def check_free(self, name: str) -> None:
        """Refuse a name that an image could not have. Raises: AlreadyExists, UsageError."""
        check_image_name(name)
        if (self.folder / name).exists():
            raise AlreadyExists(
                f"there is an image '{name}' already",
                hint=f"choose another name, or drivebay image delete {name}",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold all names still: nobody else adds or deletes an image meanwhile."""
        with host_errors(f"can't use the folder of images '{self.folder}'", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder on the images' file system to make one in; it is gone afterwards."""
        with self.locked():
            self._sweep()
            with host_errors(f"can't make a folder in '{self.folder}'", self.folder):
                folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
                folder.chmod(0o755)
                alive = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(alive, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(alive)

    def _sweep(self) -> None:
        """Remove workspaces whose process is gone: nobody holds their locks."""
        for folder in self.folder.glob(f"{_UNFINISHED}*"):
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def add(self, name: str, raw: Path, facts: ImageFacts, report: Report = quiet) -> Image:
        """Take over a raw file that was made in a `workspace`. Raises: AlreadyExists, HostError."""
        self.check_free(name)
        with host_errors(f"can't take over '{raw}' as image '{name}'", raw):
            virtual_size = raw.stat().st_size
            if virtual_size == 0:
                raise UsageError(f"'{raw.name}' is empty, and an image is not")
            # What is added reads as zeroes and takes up nothing.
            size = -(-virtual_size // WHOLE) * WHOLE
            with raw.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
            checksum = _checksum(raw, report)
            raw.chmod(0o444)
            ready = Path(tempfile.mkdtemp(dir=raw.parent))
            ready.chmod(0o755)
            path = raw.rename(ready / "image.raw")
        status = path.stat()
        image = Image(name, path, facts, datetime.now(UTC).replace(microsecond=0),
                      str(uuid.uuid4()), size, virtual_size, checksum,
                      status.st_mtime_ns, status.st_ino)  # fmt: skip
        _write(image)
        with self.locked():
            self.check_free(name)
            with host_errors(f"can't add image '{name}'", self.folder):
                ready.rename(self.folder / name)
                _sync(self.folder)
        return self.get(name)

    def verify(self, image: Image, report: Report = quiet) -> None:
        """Compare the content with the checksum; if it is equal, its file is the image's again.

        Raises: StateError when it differs.
        """
        with host_errors(f"can't read image '{image.name}'", image.path):
            found = _checksum(image.path, report)
            status = image.path.stat()
        if found != image.checksum:
            raise StateError(
                f"image '{image.name}' was changed: its checksum is {found}, and was "
                f"{image.checksum} when it was added",
                hint=f"take it from {image.facts.origin} again, under another name",
            )
        if (status.st_mtime_ns, status.st_ino) != (image.mtime_ns, image.inode):
            # A copy that came back from a backup, say.
            _write(replace(image, mtime_ns=status.st_mtime_ns, inode=status.st_ino))

    def grow(self, image: Image, size: int, report: Report = quiet) -> Image:
        """Make an image that nobody uses longer; what is added reads as zeroes.

        Raises: UsageError, StateError, HostError.
        """
        image.check_unchanged()
        if size % WHOLE or size <= image.size:
            raise UsageError(
                f"image '{image.name}' has {format_size(image.size)}: its new size has to be "
                f"larger, and a multiple of {format_size(WHOLE)}"
            )
        with host_errors(f"can't make image '{image.name}' larger", image.path):
            checksum = _checksum(image.path, report, size)
            image.path.chmod(0o600)
            try:
                os.truncate(image.path, size)
            finally:
                image.path.chmod(0o444)
            status = image.path.stat()
        grown = replace(
            image, size=size, virtual_size=size, checksum=checksum, mtime_ns=status.st_mtime_ns
        )
        _write(grown)
        return grown

    def delete(self, name: str, release: Callable[[], object]) -> None:
        """Remove an image, once ``release`` has seen that nobody uses it (`users.refuse_used`).

        It runs while all names are held still, so whoever holds them, too, while a clone is
        made can't lose the image meanwhile. Raises: NotFound, HostError, what release raises.
        """
        with self.locked():
            self.get(name)
            release()
            with host_errors(f"can't delete image '{name}'", self.folder / name):
                self._remove(name)

    def _remove(self, name: str) -> None:
        # By one rename it is no image any more; what a crash leaves then is swept away.
        doomed = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        (self.folder / name).rename(doomed / name)
        shutil.rmtree(doomed)


# ---- content ------------------------------------------------------------------------------------


def _checksum(path: Path, report: Report, size: int | None = None) -> str:
    """SHA-256 over each MiB that is not all zero, its number first, and over the size last.

    Holes are not read, so it takes as long as there is data, and two files that read the same
    have the same one, however sparse they are.
    """
    digest = hashlib.sha256()
    zeroes = bytes(_MIB)
    with path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        offset = _next_data(file.fileno(), 0, end)
        while offset < end:
            file.seek(offset)
            piece = file.read(_MIB).ljust(_MIB, b"\0")
            if piece != zeroes:
                digest.update((offset // _MIB).to_bytes(8, "little"))
                digest.update(piece)
            offset = _next_data(file.fileno(), offset + _MIB, end)
            report("reading it back", min(offset, end), end)
    digest.update((end if size is None else size).to_bytes(8, "little"))
    return f"sha256-data:{digest.hexdigest()}"


def _next_data(descriptor: int, offset: int, end: int) -> int:
    """The first whole MiB from ``offset`` on that holds data; the end if there is none."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) // _MIB * _MIB
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        raise


# ---- image.toml ---------------------------------------------------------------------------------

_OPTIONAL: Final = {"os": "", "user": None, "cloud_init": None}
_KINDS: Final[dict[str, type]] = {
    "origin": str, "os": str, "user": str, "cloud_init": bool, "created": datetime, "uuid": str,
    "size": int, "virtual_size": int, "checksum": str, "mtime_ns": int, "inode": int,
}  # fmt: skip


def _read_image(name: str, path: Path, text: str) -> Image:
    try:
        values: dict[str, Any] = _OPTIONAL | tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StateError(f"the image.toml of image '{name}' is not TOML: {error}") from error
    for key, kind in _KINDS.items():
        value = values.get(key)
        if type(value) is not kind and not (key in _OPTIONAL and value == _OPTIONAL[key]):
            raise StateError(
                f"the image.toml of image '{name}' has no good '{key}'",
                hint=f"remove '{path.parent}' and add the image again",
            )
    if values["size"] <= 0 or values["size"] % WHOLE or not _is_uuid(values["uuid"]):
        raise StateError(f"the image.toml of image '{name}' has a size or uuid that can't be")
    facts = ImageFacts(values["origin"], values["os"], values["user"], values["cloud_init"])
    return Image(name, path, facts, *(values[key] for key in _KINDS if not hasattr(facts, key)))


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _write(image: Image) -> None:
    """Write image.toml beside image.raw, all of it or nothing."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("Written by drivebay; image.raw is compared with it."))
    for key in _KINDS:
        value = getattr(image.facts if hasattr(image.facts, key) else image, key)
        if value is not None:
            document.add(key, value)
    path = image.path.with_name("image.toml")
    with host_errors(f"can't write '{path}'", path):
        new = path.with_name(".image.toml.new")
        with new.open("w") as file:
            file.write(tomlkit.dumps(document))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
