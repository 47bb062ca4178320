"""made.json of a network: each thing that was made for it, written down before it was made.

Context: a short-lived process of root, which holds the network's lock. A kill at any moment leaves
at most a thing that is in the journal and not there, which its removal passes over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.system.files import refusal, write_private

__all__ = ["Journal", "Made"]

_FILE: Final = "made.json"
KINDS: Final = ("table", "bridge", "uplink", "dnsmasq", "allowed")


@dataclass(frozen=True)
class Made:
    """One thing: what it is, its name in the system, and what its end needs to know."""

    kind: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The journal in a network's folder, in the order in which things were made."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE

    def entries(self) -> list[Made]:
        """Raises: HostError; UsageError when a person has broken it."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            entries = [Made(str(e["kind"]), str(e["name"]), dict(e["facts"])) for e in found]
            unknown = [entry.kind for entry in entries if entry.kind not in KINDS]
            if unknown:
                raise ValueError(f"unknown kind {unknown[0]}")
            return entries
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refusal("can't read", self._path, error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"'{self._path}' is not what Drivebay wrote: {error!r:.80}",
                hint=f"rm {self._path}; what was made is found by its name, too",
            ) from error

    def find(self, kind: str) -> Made | None:
        """The thing of that kind; each network has one at most."""
        return next((entry for entry in self.entries() if entry.kind == kind), None)

    def note(self, kind: str, name: str, **facts: Any) -> None:
        """Write a thing down; one of its kind that is there keeps its place in the order.

        Raises: HostError.
        """
        made = Made(kind, name, facts)
        entries = self.entries()
        if any(entry.kind == kind for entry in entries):
            self._write(made if entry.kind == kind else entry for entry in entries)
        else:
            self._write([*entries, made])

    def strike(self, kind: str) -> None:
        """Forget a thing that is gone."""
        self._write(entry for entry in self.entries() if entry.kind != kind)

    def _write(self, entries: Iterable[Made]) -> None:
        values = [{"kind": e.kind, "name": e.name, "facts": e.facts} for e in entries]
        write_private(self._path, (json.dumps(values, indent=2) + "\n").encode())
