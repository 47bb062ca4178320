from typing import NamedTuple

from drivebay.reactor.mailbox import Answer, ControlMailbox

class ReactorStats(NamedTuple):
    core: int
    tid: int  # 0 before start()
    busy_ticks: int
    idle_ticks: int
    loops: int
    sleeping: bool
    place: str  # what the reactor was doing when looked at
    queues_hot: int
    queues_armed: int

class Reactor:
    """One data-plane thread, pinned to one core, running without the GIL."""

    core: int

    def __init__(self, core: int, control: ControlMailbox, poll_us: int = ...) -> None:
        """Set up. poll_us bounds the polling after the last work; -1 polls for ever.

        Raises: HostError when descriptors run out.
        """

    def start(self) -> None:
        """Start the thread. Raises HostError when the core can't be had."""

    def stop(self) -> Answer:
        """Ask the loop to end; its queues and channels must be gone."""

    def join(self) -> None:
        """Wait for the thread. After stop() was answered."""

    def step(self, now: int) -> int:
        """One turn of the loop by hand, at tick ``now``, never sleeping; returns work done.

        The test door: only without start(); ticks are then nanoseconds.
        """

    def rescue(self) -> bool:
        """Free it from a call eventfd that its other holder made blocking; was it in one?

        For when ``loops`` stands still at the place "notifying a guest".
        """

    def stats(self) -> ReactorStats: ...
    def close(self) -> None: ...
