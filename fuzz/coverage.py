"""The message decoder under libFuzzer: inputs are kept for the branches that they reach.

    python -m fuzz.coverage SECONDS SEED SCRATCH

Needs atheris, which counts the branches of Python code. What fails is written to SCRATCH/found
by libFuzzer, and runs again with `python -m fuzz messages FILE`. A process of its own: libFuzzer
ends it by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from fuzz.explorer import HANG_S, HERE, INPUT_BYTES

with atheris.instrument_imports(
    include=["drivebay.vhost", "drivebay.wire", "fuzz.messages", "fuzz.speech"]
):
    from fuzz.messages import Messages

__all__: list[str] = []


def main(seconds: float, seed: int, scratch: Path) -> None:
    corpus, found = scratch / "messages-corpus", scratch / "found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    target = Messages()

    def run(data: bytes) -> None:
        target.run(data)

    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed % (1 << 32)}",
        f"-max_len={INPUT_BYTES}",
        f"-timeout={HANG_S}",
        f"-artifact_prefix={found}/messages-",
        # Truncated guest memory is met by the target's own handler.
        "-handle_bus=0",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus), str(HERE / "corpus" / "messages")],
        run,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
