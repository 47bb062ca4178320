"""The recorded requests, sent to targets of ours in their order. Context: tests.

One process for each that was recorded. What SPDK's initiator and bdevperf did between the
requests, a session of ours does here: it connects, and leaves, at the same places.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess, wait_until
from tests.fakes.rpc_client import exchange
from tests.spec.recording import Difference, Translation, compare, compare_answers

MIB: Final = 1 << 20
SPDK_RPC: Final = Path(sys.executable).with_name("spdk-rpc")
PATIENCE_S: Final = 60
IMAGES: Final = {"aio0.img": 64, "uring0.img": 64, "uring1.img": 64, "aio_lvs.img": 256}  # MiB


@dataclass(frozen=True)
class Run:
    """One process: the calls ``first`` to ``last``, and how it was started."""

    first: int
    last: int
    options: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()  # images that hold nothing at its start


RUNS: Final = (
    Run(0, 507, ("--wait-for-rpc",)),
    Run(508, 518, ("--wait-for-rpc",)),
    Run(519, 523),
    Run(524, 558, blank=("aio_lvs.img",)),
    Run(559, 564, ("--wait-for-rpc",)),
    Run(565, 573),
    Run(574, 583),
    Run(584, 585, ("--rpcs-allowed", "rpc_get_methods,spdk_get_version")),
    Run(586, 592),
    Run(593, 595),
    Run(596, 616),
    Run(617, 636),
)

# What happened before a call: sessions come and go.
CONNECTS: Final[dict[int, tuple[tuple[str, int], ...]]] = {
    462: (("vhost.0", 1),),
    463: (("vhost.1", 2),),
    464: (("vhost.0", 2),),
    569: (("vhost.0", 1),),
    576: (("vhost.0", 1),),
    588: (("vhost.0", 1),),
    599: (("vhost.0", 1),),
    630: (("vhost.q", 1),),
}
DISCONNECTS: Final[dict[int, tuple[str, ...]]] = {
    487: ("vhost.1",),
    488: ("vhost.0",),
    571: ("vhost.0",),
    582: ("vhost.0",),
    614: ("vhost.0",),
}
WORKS: Final = (599, 604, 630)
# Calls before others: what the recording goes on with though our target refused it, and what
# it left out.
MADE: Final[dict[int, tuple[str, dict[str, Any]]]] = {
    171: ("bdev_malloc_create", {"name": "MMD", "num_blocks": 1024, "block_size": 512}),
    193: ("bdev_uring_create", {"name": "U0", "filename": "RUN/uring1.img", "block_size": 512}),
    486: ("bdev_malloc_delete", {"name": "M0"}),
    492: ("vhost_delete_controller", {"ctrlr": "vhost.0", "force": True}),
    571: ("vhost_delete_controller", {"ctrlr": "vhost.0", "force": True}),
}
# load_config gets what save_config gave, by number.
LOADED: Final = {508: 459, 559: 554, 564: 554}


@dataclass
class Stage:
    """One run while it goes on."""

    folder: Path
    target: TargetProcess
    translation: Translation
    sessions: dict[str, list[Session]] = field(default_factory=dict)

    def directions(self, number: int) -> None:
        for name in DISCONNECTS.get(number, ()):
            if self.sessions.get(name):
                self.sessions[name].pop(0).close()
                wait_until(self.rests, "nothing of the session that ended is left")
        for name, queues in CONNECTS.get(number, ()):
            session = Session(self.folder / name, queues=queues)
            self.sessions.setdefault(name, []).append(session)
        if number in MADE:
            method, params = MADE[number]
            text = json.dumps(params).replace("RUN/", f"{self.folder}/")
            self.target.rpc(method, **json.loads(text))
        if number in WORKS:
            (session,) = next(iter(self.sessions.values()))
            session.disk.write(0, bytes(4096))
            session.disk.read(0, 4096)

    def rests(self) -> bool:
        """Whether no guest memory lingers, which would be shown."""
        return all("lingering" not in each for each in self.target.rpc("vhost_get_controllers"))

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def close(self) -> None:
        for sessions in self.sessions.values():
            for session in sessions:
                session.close()
        self.target.stop()


@contextlib.contextmanager
def folder_of_runs() -> Iterator[Path]:
    """What the runs share: files, some with what an earlier run left in them."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        folder = Path(name)
        for file in IMAGES:
            make_blank(folder / file)
        (folder / "plainfile").touch()
        (folder / "scratch").mkdir()
        yield folder


def make_blank(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(IMAGES[image.name] * MIB)


def replay(
    run: Run, calls: list[dict[str, Any]], translation: Translation
) -> dict[int, list[Difference]]:
    """Every call of a run, and what differs. Volumes have their uuids in the runs after it too."""
    folder = Path(translation.folder)
    for file in run.blank:
        make_blank(folder / file)
    stage = Stage(folder, TargetProcess(folder, *run.options), translation)
    try:
        return {
            call["n"]: _differences(stage, call)
            for call in calls
            if run.first <= call["n"] <= run.last
        }
    finally:
        stage.close()


def _differences(stage: Stage, call: dict[str, Any]) -> list[Difference]:
    stage.directions(call["n"])
    kind = call["call"].split()[0]
    do = _KINDS.get(kind, _request)
    return list(do(stage, call))


def _request(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    request = {"jsonrpc": "2.0", "id": 1, "method": call["call"]}
    if call["params"] is not None:
        text = json.dumps(call["params"])
        stage.translation.fixed(text)
        request["params"] = json.loads(stage.translation.text(text))
    (line,) = exchange(stage.target.rpc_path, json.dumps(request).encode()).splitlines()
    yield from compare_answers({"id": 1, **call}, json.loads(line), stage.translation)


def _raw(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    text: str = call["params"].replace("REPEAT300000", "a" * 300_000)
    # Lone bytes above 127 stand for themselves.
    sent = text.encode("latin-1" if max(text) < "\u0100" else "utf-8")
    recorded = [json.loads(line) for line in call["result"].splitlines()]
    ours = [json.loads(line) for line in exchange(stage.target.rpc_path, sent).splitlines()]
    if len(recorded) != len(ours):
        yield Difference("lines", recorded, [_bare(line) for line in ours])
        return
    for theirs, mine in zip(recorded, ours, strict=True):
        if isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
            for a, b in zip(theirs, mine, strict=True):
                yield from compare_answers(a, b, stage.translation)
        else:
            yield from compare_answers(theirs, mine, stage.translation)


def _bare(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        return {"error": answer["error"]["code"], "id": answer["id"]}
    return answer


def _client(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    words = call["call"].split()[2:]
    feed = call["params"]
    if call["n"] in LOADED:
        feed = (stage.scratch / f"saved{LOADED[call['n']]}.json").read_text()
    done = subprocess.run(
        [SPDK_RPC, "-s", str(stage.target.rpc_path), "-t", str(PATIENCE_S), *words],
        input=feed,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "COLUMNS": "80"},
    )
    if words == ["save_config"]:
        (stage.scratch / f"saved{call['n']}.json").write_text(done.stdout)
    ours = {"rc": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    yield from compare(_readable(call["result"]), _readable(ours), stage.translation)


def _readable(shown: dict[str, Any]) -> dict[str, Any]:
    """What was printed, as a value where it is JSON; the place of a script aside."""
    try:
        return {**shown, "stdout": json.loads(shown["stdout"])}
    except ValueError:
        return shown


def _start(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    params = call["params"]
    config = stage.scratch / f"start{call['n']}.json"
    config.write_text(params if isinstance(params, str) else json.dumps(params))
    options = [] if call["n"] != 521 else ["--json-ignore-init-errors"]
    command = [sys.executable, "-m", "drivebay", "vhost", "-S", str(stage.folder), "-m", "0x1"]
    command += ["-r", str(stage.scratch / "start.sock"), "-c", str(config), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        status = process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(PATIENCE_S)
        status = 124  # as timeout(1) says it
    yield from compare(call["result"]["rc"], status, stage.translation, "result/rc")


def _process(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    """The end of a run; what was measured of SPDK's is not compared."""
    if "exit_status" not in call["result"]:
        return
    if call["n"] != 507:  # that one was ended by an RPC
        stage.target.process.send_signal(signal.SIGINT)
    status = stage.target.process.wait(PATIENCE_S)
    yield from compare(call["result"]["exit_status"], status, stage.translation, "exit_status")
    theirs = call["result"].get("sockets_left")
    if theirs is not None:
        left = {path.name for path in stage.folder.iterdir()}
        kept = {*IMAGES, "target.log", "scratch"}
        yield from compare(theirs, sorted(left - kept), stage.translation, "files")


def _nothing(stage: Stage, call: dict[str, Any]) -> Iterator[Difference]:
    """The load of a program, or its findings; a session of ours stands in for it."""
    yield from ()


_KINDS: Final[dict[str, Callable[[Stage, dict[str, Any]], Iterator[Difference]]]] = {
    "RAW": _raw,
    "CLI": _client,
    "START": _start,
    "PROCESS": _process,
    "bdevperf": _nothing,
    "COMPARE": _nothing,
}
