"""What a command is about to do, step by step: shown, asked about, done, and undone on failure.

Context: a short-lived process. Every command that changes something makes a Plan and hands
it to `carry_out`, so ``--dry-run``, ``--yes`` and the way back after a failure are the same
everywhere. A plan is built by looking only; nothing is changed before it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from drivebay.cli.output import print_json, print_warning
from drivebay.errors import DrivebayError, StateError

__all__ = ["Plan", "add_change_options", "ask", "carry_out"]


@dataclass(frozen=True, slots=True)
class _Step:
    text: str
    do: Callable[[], object]
    undo: Callable[[], object] | None


@dataclass
class Plan:
    """Steps in order; ``facts`` are shown above them (what a disk is, what it holds)."""

    facts: list[str] = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)

    def add(
        self, text: str, do: Callable[[], object], undo: Callable[[], object] | None = None
    ) -> None:
        """Add a step; ``undo`` takes it back when a later one fails."""
        self._steps.append(_Step(text, do, undo))

    def undo_last(self, undo: Callable[[], object]) -> None:
        """Say how the step that was added last is taken back."""
        self._steps[-1] = replace(self._steps[-1], undo=undo)

    @property
    def texts(self) -> list[str]:
        """The steps in words."""
        return [step.text for step in self._steps]

    def run(self) -> None:
        """Do the steps. Raises: what a step raises, after those before it were taken back."""
        done: list[_Step] = []
        for step in self._steps:
            try:
                step.do()
            except BaseException:
                for earlier in reversed(done):
                    _take_back(earlier)
                raise
            done.append(step)


def _take_back(step: _Step) -> None:
    if step.undo is None:
        return
    try:
        step.undo()
    except DrivebayError as error:
        print_warning(f"this could not be taken back ({step.text}): {error}")


def add_change_options(parser: argparse.ArgumentParser, *, asks: bool = False) -> None:
    """Add ``--dry-run``, and ``--yes`` to a command that asks."""
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be done, and do nothing"
    )
    if asks:
        parser.add_argument("--yes", action="store_true", help="do not ask")


def carry_out(plan: Plan, found: argparse.Namespace, question: str | None = None) -> bool:
    """Show the plan, ask if there is a question, and run it; False after a dry run.

    Raises: StateError when the answer is no or cannot be given; what a step raises.
    """
    if found.dry_run:
        if found.json:
            print_json({"facts": plan.facts, "would": plan.texts})
        else:
            print("\n".join([*plan.facts, *(f"would {text}" for text in plan.texts)]))
        return False
    if question is not None and not found.yes:
        lines = [*plan.facts, *(f"  - {text}" for text in plan.texts)]
        print("\n".join(lines), file=sys.stderr)
        ask(question)
    plan.run()
    return True


def ask(question: str) -> None:
    """Go on only after a yes. Raises: StateError; nothing was changed then."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StateError(
            f"nobody can be asked without a terminal: {question}", hint="add --yes if it may"
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise StateError("not confirmed, so nothing was changed")
