"""Where a lab is made: the target, the VMs, the images, and the record of what is made.

Context: a short-lived process that holds the lab's lock. Each thing is made by a plan of its
own, all or nothing; between two things `up` may fail or be killed, and the next one goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivebay.disks.inventory import Inventory, read_inventory
from drivebay.disks.plan import Plan
from drivebay.errors import DrivebayError, StateError, Unreachable
from drivebay.vm.images.store import Images, Report, quiet
from drivebay.vm.lab.lines import Place
from drivebay.vm.lab.model import Lab, Source
from drivebay.vm.lab.record import Record, Thing
from drivebay.vm.store import Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["Site", "Up", "told_at", "would_lose"]


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass
class Site:
    """``name`` is the lab's; ``socket`` the target's, by its path."""

    name: str
    record: Record
    client: Client
    socket: str
    vms: Vms = field(default_factory=Vms)
    images: Images = field(default_factory=Images)
    say: Callable[[str], None] = _silent
    report: Report = quiet

    def full(self, name: str) -> str:
        """What a thing of the lab is called in the world."""
        return f"{self.name}-{name}"

    def inventory(self) -> Inventory:
        """What the target has now."""
        return read_inventory(self.client)

    def make(self, thing: Thing, plan: Plan) -> None:
        """Make a thing, which is in the record before, and is not when nothing of it is left.

        After Ctrl-C it stays begun, too: of the step that was interrupted all may be done.
        """
        before = self.record.find(thing.kind, thing.name)
        self.record.begin(thing)
        try:
            plan.run()
        except Unreachable:
            raise  # nobody knows whether the last call was carried out: it stays begun
        except DrivebayError:
            if not plan.left:
                if before is None:
                    self.record.forget(thing.kind, thing.name)
                else:
                    self.record.put(before)
            raise
        self.record.finish(thing)


@dataclass
class Up:
    """An `up` that is being planned: ``plan`` has one step for each thing that changes."""

    site: Site
    lab: Lab
    inventory: Inventory  # as it is before the first step
    doomed: frozenset[tuple[str, str]] = frozenset()  # things that are made anew
    plan: Plan = field(default_factory=Plan)
    question: str | None = None
    settled: list[Thing] = field(default_factory=list)  # there, though the record has them as begun

    def add(self, text: str, act: Callable[[], object]) -> None:
        """Add a step that is all or nothing by itself, and stays when a later one fails."""

        def told() -> None:
            self.site.say(text)
            act()

        self.plan.add(text, told)

    def carry_out_later(self, text: str, fill: Callable[[Plan], object]) -> None:
        """Add a plan as one step; it is built now, to see whether it can be, and when it is run."""
        fill(Plan())

        def act() -> None:
            plan = Plan()
            fill(plan)
            plan.run()

        self.add(text, act)

    def settle(self) -> None:
        """Write down what an `up` that was killed had made, and not written down."""
        for thing in self.settled:
            self.site.record.finish(thing)

    def thing(self, kind: str, name: str) -> Thing | None:
        """What the record has of a thing that stays."""
        return None if (kind, name) in self.doomed else self.site.record.find(kind, name)

    def pool_name(self, pool: str | None) -> str:
        """What a pool of the file is called; without one, that of all who named none."""
        return "default" if pool is None else self.site.full(pool)


@contextlib.contextmanager
def told_at(source: Source, place: Place) -> Iterator[None]:
    """Say at which line of the file something belongs that the world does not allow."""
    try:
        yield
    except DrivebayError as error:
        told = str(error)
        if not told.startswith(f"{source.path.name}, line "):
            error.args = (f"{source.path.name}, line {source.line(place)}: {told}",)
        raise


def would_lose(what: str, name: str) -> StateError:
    """A change that only a new thing in place of the old one could carry out."""
    return StateError(
        f"{what}, and what is on it would be lost",
        hint=f"put the old value back; or, if it may be lost: --recreate {name}",
    )
