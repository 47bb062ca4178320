"""What each lab has made, written down before it is made.

Context: a short-lived process that holds the lab's lock. `up` may be killed at any moment, so a
thing is in the record before the first step that makes it, and called finished after the last:
what is there and in no record is somebody else's, and what is not finished is mended by the next
`up`. DATA/labs/LAB.json; docs/labs.md tells people of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from drivebay.disks.places import data_folder, holds_data, remove_file
from drivebay.errors import HostError, StateError
from drivebay.system.files import write_private
from drivebay.system.locks import held

__all__ = ["Labs", "Record", "Thing"]

KINDS: Final = ("pool", "network", "disk", "parts", "vm")


@dataclass(frozen=True)
class Thing:
    """One thing that `up` makes. ``name`` is the file's: data-1; of parts, their table's."""

    kind: str  # one of KINDS
    name: str
    bdev: str = ""  # a disk's name in the target; of parts, that of the disk that they are of
    file: str = ""  # on which a pool or disk lies
    made_file: bool = False  # by us, so that it goes with the thing
    finished: bool = False

    def remove_unwritten_file(self) -> None:
        """Remove a file that we had made, and put nothing into. Raises: HostError."""
        path = Path(self.file)
        if self.made_file and path.exists() and not holds_data(path):
            remove_file(path)


@dataclass
class Record:
    """All that a lab has made, and the file that describes it."""

    path: Path
    file: str
    things: dict[tuple[str, str], Thing] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> Thing | None:
        """That thing, if it was ever begun."""
        return self.things.get((kind, name))

    def begin(self, thing: Thing) -> None:
        """Write down what is going to be made. Raises: HostError."""
        self.put(replace(thing, finished=False))

    def finish(self, thing: Thing) -> None:
        """Write down that it is made. Raises: HostError."""
        self.put(replace(thing, finished=True))

    def forget(self, kind: str, name: str) -> None:
        """Nothing is left of a thing. Raises: HostError."""
        if self.things.pop((kind, name), None) is not None:
            self.save()

    def save(self) -> None:
        """Write it, at once or not at all. Raises: HostError."""
        values = {"file": self.file, "things": [asdict(thing) for thing in self.things.values()]}
        write_private(self.path, (json.dumps(values, indent=1) + "\n").encode())

    def put(self, thing: Thing) -> None:
        """Write down what is known of a thing. Raises: HostError."""
        if self.find(thing.kind, thing.name) != thing:
            self.things[thing.kind, thing.name] = thing
            self.save()


class Labs:
    """The records of all labs of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = data_folder() / "labs" if folder is None else folder

    def names(self) -> list[str]:
        """The labs that have made something."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.json"))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def load(self, name: str) -> Record | None:
        """A lab's record. Raises: StateError, HostError."""
        path = self.path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise HostError(
                f"can't read '{path}', the record of lab '{name}'",
                getattr(error, "errno", None) or 0,
                path=str(path),
            ) from error
        try:
            values = json.loads(text)
            things = [_read_thing(each) for each in values["things"]]
            return Record(path, str(values["file"]),
                          {(thing.kind, thing.name): thing for thing in things})  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise StateError(
                f"'{path}', the record of lab '{name}', can't be understood: {error!r}",
                hint="take it from a backup; without it the lab's pools and disks are nobody's",
            ) from error

    def of_file(self, file: Path) -> str | None:
        """The name of the lab that a file has made, whatever the file says now."""
        for name in self.names():
            with contextlib.suppress(StateError):
                record = self.load(name)
                if record is not None and record.file == str(file):
                    return name
        return None

    def delete(self, record: Record) -> None:
        """Remove a record of which nothing is left. Raises: HostError."""
        try:
            record.path.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(
                f"can't remove '{record.path}'", error.errno or 0, path=str(record.path)
            ) from error

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep any other `up` and `down` of this lab away. Raises: InUse, HostError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(
                f"can't make '{self.folder}'", error.errno or 0, path=str(self.folder)
            ) from error
        busy = f"another command brings lab '{name}' up or down right now"
        with held(self.folder / f".lock-{name}", busy):
            yield


def _read_thing(values: object) -> Thing:
    if not isinstance(values, dict):
        raise TypeError("a thing is no table")
    thing = Thing(**values)
    texts = (thing.kind, thing.name, thing.bdev, thing.file)
    marks = (thing.made_file, thing.finished)
    if not (
        thing.kind in KINDS
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(mark, bool) for mark in marks)
    ):
        raise ValueError(f"a thing is wrong: {thing.name!r}")
    return thing
