"""The process in which a target runs: it may die, so __main__ watches it from outside.

python -m fuzz.worker NAME SEED SECONDS INPUTS CURRENT [KEEP]     explore, after the corpus
python -m fuzz.worker NAME replay CURRENT FILE...                 only these
"""

from __future__ import annotations

import sys
from pathlib import Path

from fuzz.explorer import Explorer, Target, corpus_of, save_input

__all__: list[str] = []


def target(name: str) -> Target:
    if name == "rings":
        from fuzz.rings import Rings

        return Rings()
    from fuzz.messages import Messages

    return Messages()


def explore(name: str, seed: int, seconds: float, inputs: int, current: Path) -> Explorer:
    """``inputs`` 0: as many as the time allows."""
    explorer = Explorer(target(name), seed, current)
    explorer.replay(path.read_bytes() for path in corpus_of(name))
    explorer.explore(seconds, inputs or None)
    return explorer


def main(words: list[str]) -> None:
    name = words[0]
    if words[1] == "replay":
        explorer = Explorer(target(name), 0, Path(words[2]))
        explorer.replay(Path(word).read_bytes() for word in words[3:])
    else:
        seed, seconds, inputs = int(words[1]), float(words[2]), int(words[3])
        explorer = explore(name, seed, seconds, inputs, Path(words[4]))
        for data in explorer.kept if len(words) > 5 else ():
            save_input(data, Path(words[5]), name)
    explorer.target.close()
    print(f"{name}: {explorer.executed} inputs, {len(explorer.seen)} behaviours", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
