"""The folders of the networks: found, made at once or not at all, changed by one at a time.

Context: a short-lived process. Layout: docs/networks-shape.md. Networks are root's, and everybody
may look at them: `vm start` of a plain user has to find the bridge.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

from drivebay.disks.places import data_folder
from drivebay.errors import AlreadyExists, DrivebayError, NotFound, StateError
from drivebay.net.model import Network, check_network_name, read_network, write_network
from drivebay.system.files import refusal, write_public
from drivebay.system.locks import held

__all__ = ["Networks", "require_root"]

ROOTS: Final = Path("/var/lib/drivebay/networks")
_FILE: Final = "network.toml"
_NEW, _GONE = ".new-", ".gone-"
LOCK_SECONDS: Final = 60.0


class Networks:
    """All networks of this host, in ``folder``."""

    def __init__(self, folder: Path | None = None) -> None:
        ours = data_folder() / "networks" if os.geteuid() == 0 else ROOTS
        self.folder = ours if folder is None else folder

    def names(self) -> list[str]:
        """The networks' names, sorted."""
        try:
            found = [path.parent.name for path in self.folder.glob(f"*/{_FILE}")]
        except OSError as error:
            raise refusal("can't look into", self.folder, error) from error
        return sorted(name for name in found if not name.startswith("."))

    def of(self, name: str) -> Path:
        """A network's folder, whether it is there or not."""
        return self.folder / name

    def load(self, name: str) -> Network:
        """Read one. Raises: NotFound; UsageError when its network.toml is wrong; HostError."""
        check_network_name(name)
        path = self.of(name) / _FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise _no_such(name) from None
        except (OSError, UnicodeDecodeError) as error:
            raise refusal("can't read", path, error) from error
        try:
            return read_network(name, text)
        except DrivebayError as error:
            error.hint = error.hint or f"mend it: {path}"
            raise

    def others(self, name: str) -> list[Network]:
        """Those beside ``name`` that can be read: one that is broken blocks no other."""
        found = []
        for other in self.names():
            with contextlib.suppress(DrivebayError):
                if other != name:
                    found.append(self.load(other))
        return found

    @contextlib.contextmanager
    def locked(self, name: str, *, new: bool = False) -> Iterator[None]:
        """Keep all other changes of this network away, after those that go on.

        Raises: NotFound, unless it may be ``new``; InUse when one goes on for long; HostError.
        """
        check_network_name(name)
        if new:
            self._make_folder()
        elif not self.of(name).is_dir():
            raise _no_such(name)
        with _waited_for(self.folder / f".lock-{name}", f"network '{name}'"):
            # The change that went on may have been its end.
            if not (new or self.of(name).is_dir()):
                raise _no_such(name)
            yield

    @contextlib.contextmanager
    def all_locked(self) -> Iterator[None]:
        """Keep away changes of what the networks share: subnets, forwarding. The inner lock."""
        self._make_folder()
        with _waited_for(self.folder / ".lock-hosts", "what networks share"):
            yield

    def create(self, network: Network) -> None:
        """Make a network's folder. Raises: AlreadyExists, HostError; nothing is left then."""
        self._make_folder()
        self._sweep()
        try:
            fresh = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.folder))
        except OSError as error:
            raise refusal("can't make a folder in", self.folder, error) from error
        try:
            fresh.chmod(0o755)
            write_public(fresh / _FILE, write_network(network).encode())
            fresh.rename(self.of(network.name))
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise AlreadyExists(
                    f"there is a network '{network.name}' already",
                    hint=f"drivebay net info {network.name}",
                ) from None
            if isinstance(error, OSError):
                raise refusal("can't make", self.of(network.name), error) from error
            raise

    def mark_made(self, network: Network) -> Network:
        """Write down that a network is complete. Raises: HostError."""
        made = replace(network, made=True)
        write_public(self.of(network.name) / _FILE, write_network(made).encode())
        return made

    def delete(self, name: str) -> None:
        """Remove a network's folder, whose devices are gone. Raises: HostError."""
        gone = self.folder / f"{_GONE}{name}-{os.getpid()}"
        try:
            self.of(name).rename(gone)  # at once, so that no half of it is ever listed
            shutil.rmtree(gone)
        except OSError as error:
            raise refusal("can't remove", self.of(name), error) from error
        # The lock's file stays: who waits for it would else hold a lock that nobody sees.

    def _sweep(self) -> None:
        """Remove what commands that were killed have left."""
        for path in [*self.folder.glob(f"{_NEW}*"), *self.folder.glob(f"{_GONE}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise refusal("can't make", self.folder, error) from error


def require_root(command: str) -> None:
    """Raises: StateError for a plain user, who may only look at networks."""
    if os.geteuid() != 0:
        raise StateError(
            "only root makes and changes networks, since they are the host's",
            hint=f"sudo drivebay {command}",
        )


def _waited_for(path: Path, what: str) -> AbstractContextManager[None]:
    """Hold a lock; several VMs that start beside each other come here one after the other."""
    return held(path, f"another command has been changing {what}", wait_s=LOCK_SECONDS)


def _no_such(name: str) -> NotFound:
    return NotFound(f"there is no network '{name}'", hint="drivebay net list")
