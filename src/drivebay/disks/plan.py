"""What is about to be done, step by step: done in order, and taken back when a step fails.

Context: a short-lived process. A plan is built by looking only; nothing is changed before it
runs. The command line shows it, asks about it and runs it (`cli.steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from drivebay.errors import DrivebayError

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class _Step:
    text: str
    do: Callable[[], object]
    undo: Callable[[], object] | None


@dataclass
class Plan:
    """Steps in order; ``facts`` are shown above them (what a disk is, what it holds)."""

    facts: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what could not be taken back, and why
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
                    self._take_back(earlier)
                raise
            done.append(step)

    def _take_back(self, step: _Step) -> None:
        if step.undo is None:
            return
        try:
            step.undo()
        except DrivebayError as error:
            self.left.append(f"this could not be taken back ({step.text}): {error}")
