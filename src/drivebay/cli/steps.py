"""What a command is about to do, step by step: shown, asked about, done, and undone on failure.

Context: a short-lived process. Every command that changes something makes a Plan and hands
it to `carry_out`, so ``--dry-run``, ``--yes`` and the way back after a failure are the same
everywhere. A plan is built by looking only; nothing is changed before it runs.
"""

from __future__ import annotations

import argparse
import sys

from drivebay.cli.output import print_json, print_warning
from drivebay.disks.plan import Plan
from drivebay.errors import StateError

__all__ = ["add_change_options", "ask", "carry_out"]


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
    try:
        plan.run()
    finally:
        for sentence in plan.left:
            print_warning(sentence)
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
