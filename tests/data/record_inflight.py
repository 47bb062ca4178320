"""Record what this version leaves in an inflight region, for later versions to take over.

Run from the repository when the layout changes on purpose, and commit the files:
    .venv/bin/python -m tests.data.record_inflight
"""

from __future__ import annotations

from pathlib import Path

from tests.fakes.crash_scene import Cut, play, save


def record(*, packed: bool, start: int) -> None:
    """The last cut at which a request is shown, another not, and marks are left of both."""
    cuts = [cut for cut in play(packed=packed, start=start) if len(cut.taken) == 2]
    chosen: Cut = cuts[len(cuts) // 2]
    kind = "packed" if packed else "split"
    save(chosen, Path(__file__).parent / f"inflight_{kind}.json", packed=packed, start=start)


if __name__ == "__main__":
    record(packed=False, start=65533)
    record(packed=True, start=6)
