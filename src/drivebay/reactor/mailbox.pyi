from collections.abc import Generator

class Answer:
    """What a reactor will answer: await it, or poll ``done`` (tests by step())."""

    done: bool

    def result(self) -> int:
        """The answer. Raises StateError before it is there."""

    def __await__(self) -> Generator[object, None, int]: ...

class ControlMailbox:
    """Where reactors answer, and ring for events. Context: control."""

    def __init__(self) -> None: ...
    def fileno(self) -> int:
        """An eventfd to watch for reading; drain() then."""

    def drain(self) -> int:
        """Deliver all answers and events that are here; returns how many."""
