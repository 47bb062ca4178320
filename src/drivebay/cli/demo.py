"""`drivebay demo`: a real virtual machine on a disk that we serve, from nothing to a proof.

Context: a short-lived process in the foreground. It starts a target and QEMU as children,
and whatever happens ends both and removes their folder; the logs stay.

    this process ── RPC ──► drivebay vhost ── io_uring ──► disk.img
         │                      ▲ vhost-user, shared memory
         └─ serial port ──► QEMU, the guest: writes, reboots, reads back
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE
from drivebay.errors import DrivebayError, HostError
from drivebay.vm.console import ESCAPE_NAME, attach
from drivebay.vm.guest_image import GuestImage, guest_script, prepare_guest
from drivebay.vm.hardware import Disk
from drivebay.vm.kvm import Accelerator, choose_accelerator
from drivebay.vm.machine import Machine, MachineSpec
from drivebay.vm.places import state_dir
from drivebay.vm.qemu import Qemu, find_qemu
from drivebay.vm.target import TargetProcess

__all__ = ["build_parser", "main"]

DISK_MIB = 64
DATA_MIB = 32
DATA_OFFSET_MIB = 1
QUEUES = 2
WORK_SECONDS = 120.0
RUNS_KEPT = 5
MIB = 1 << 20


def build_parser() -> Parser:
    """Describe the command's options."""
    parser = Parser(
        "drivebay demo",
        description="Boot a small Linux in QEMU on a disk that a target of ours serves.\n"
        "It writes, reboots, and reads the same bytes back; then all ends.",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="open the guest's shell instead, and keep all running until you leave it",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the demo. Returns: DONE, or raises what went wrong."""
    options = build_parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    story = Story()
    with story.step("accelerator") as say:
        accelerator = choose_accelerator()
        say(f"{accelerator.name} ({accelerator.reason})")
    qemu = find_qemu()
    with story.step("guest") as say:
        image = prepare_guest(story.note)
        major, minor = qemu.version
        say(f"Linux {image.version} and busybox, in QEMU {major}.{minor}")
    try:
        logs = _new_log_folder()
        with _run_folder() as folder:
            demo = Demo(story, accelerator, qemu, image, folder, logs)
            demo.keep() if options.keep else demo.prove()
    except OSError as error:
        raise HostError(
            f"the demo cannot use '{error.filename or tempfile.gettempdir()}'", error.errno or 0
        ) from error
    story.end(logs)
    return DONE


def _leave(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does: through the 'with' blocks, which clean up."""
    sys.exit(128 + number)


class Story:
    """Prints one line per step: its name when it starts, then what came of it, and its time."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._line_open = False

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a step; the block says how it ended, and an error leaves the line as it is."""
        start = time.monotonic()
        said: list[str] = []
        print(f"  {name:<12} ", end="", flush=True)
        self._line_open = True
        try:
            yield said.append
        finally:
            seconds = time.monotonic() - start
            words = said[-1] if said else "not finished"
            indent = "" if self._line_open else " " * 15
            print(f"{indent}{words:<66} {seconds:5.1f} s")
            self._line_open = False

    def note(self, words: str) -> None:
        """Say what takes long in the middle of a step."""
        print(f"{words} ..." if self._line_open else f"{'':15}{words} ...", flush=True)
        self._line_open = False

    def end(self, logs: Path) -> None:
        """Print the last lines."""
        seconds = time.monotonic() - self._start
        print(f"\nDone in {seconds:.1f} s; nothing is left running.")
        print(f"Logs: {logs}{os.sep}")
        for path in sorted(logs.iterdir()):
            print(f"  {path.name}")


class Demo:
    """One demo: the parts that are alive in it, and what is done with them."""

    def __init__(
        self,
        story: Story,
        accelerator: Accelerator,
        qemu: Qemu,
        image: GuestImage,
        folder: Path,
        logs: Path,
    ) -> None:
        self._story = story
        self._disk = folder / "disk.img"
        self._target = TargetProcess(folder, logs / "target.log")
        spec = MachineSpec([Disk(self._target.controller_socket("demo"), QUEUES)], cpus=QUEUES)
        self._machine = Machine(
            qemu,
            accelerator,
            image,
            spec,
            folder / "guest",
            logs,
            {"/demo.sh": guest_script("demo.sh")},
        )

    def prove(self) -> None:
        """Write, reboot, read back; then look at the file from outside."""
        with self._serving(), self._booted():
            table = self._machine.run("sh /demo.sh table").text
            print("\n" + "".join(f"    {line}\n" for line in table.splitlines()))
            with self._story.step("write") as say:
                written = self._work("written")
                say(f"{DATA_MIB} MiB of random data, synced; SHA-256 {written[:16]}…")
            with self._story.step("reboot") as say:
                self._machine.reboot()
                say("the guest restarted on the same disk")
            with self._story.step("read") as say:
                if self._work("same") != written:
                    raise DrivebayError(
                        "the guest read another sum than it wrote before its reboot"
                    )
                say(f"the same {DATA_MIB} MiB, by the sum that the disk itself held")
            with self._story.step("switch off") as say:
                self._machine.power_off()
                say("the guest ended by itself")
        with self._story.step("host") as say:
            if self._sum_on_host() != written:
                raise DrivebayError(f"'{self._disk.name}' on the host holds other bytes")
            say(f"{self._disk.name} holds the same bytes")

    def keep(self) -> None:
        """Give the user the guest's shell, until they leave it or switch the guest off."""
        with self._serving(), self._booted():
            socket, rpc = self._machine.console_socket, self._target.rpc_socket
            print(f"\n  the disk is /dev/vda, a file at {self._disk}")
            print(f"  statistics: drivebay rpc -s {rpc} bdev_get_iostat")
            if sys.stdin.isatty() and sys.stdout.isatty():
                print(f"  this is the guest's console; {ESCAPE_NAME} leaves it and ends all\n")
                attach(socket)
                print()
                return
            print(f"  console: socat -,rawer,escape=0x1d UNIX-CONNECT:{socket}")
            print("  'poweroff -f' in the guest, or Ctrl-C here, ends all", flush=True)
            while not self._machine.ended():
                time.sleep(0.2)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        with ExitStack() as stack:
            with self._story.step("target") as say:
                stack.enter_context(self._target)
                say(f"drivebay vhost, pid {self._target.pid}")
            with self._story.step("disk") as say:
                self._disk.touch(mode=0o600)
                os.truncate(self._disk, DISK_MIB * MIB)
                self._target.call(
                    "bdev_aio_create", name="demo0", filename=str(self._disk), block_size=512
                )
                self._target.call("vhost_create_blk_controller", ctrlr="demo", dev_name="demo0")
                say(f"{DISK_MIB} MiB file, bdev 'demo0', controller 'demo'")
            yield

    @contextmanager
    def _booted(self) -> Iterator[None]:
        with ExitStack() as stack:
            with self._story.step("boot") as say:
                stack.enter_context(self._machine)
                uptime = self._machine.wait_ready()
                say(f"the guest's first process ran {uptime:.1f} s after its kernel")
            yield

    def _work(self, expected: str) -> str:
        """Let the guest do its next part; return the sum that it tells."""
        done = self._machine.run(f"sh /demo.sh work {DATA_MIB}", WORK_SECONDS)
        words = done.text.split()
        if done.code != 0 or len(words) < 2 or words[-2] != expected:
            raise DrivebayError(
                f"the guest's part failed with code {done.code}; it printed: {done.text.strip()}",
                hint=f"see {self._machine.console_log} and {self._target.log}",
            )
        return words[-1]

    def _sum_on_host(self) -> str:
        with self._disk.open("rb") as file:
            file.seek(DATA_OFFSET_MIB * MIB)
            return hashlib.sha256(file.read(DATA_MIB * MIB)).hexdigest()


@contextmanager
def _run_folder() -> Iterator[Path]:
    """A folder with a short name (socket paths end at 107 bytes), gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="drivebay-demo-"))
    try:
        folder.chmod(0o711)  # an unprivileged QEMU passes through to a folder of its own
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_log_folder() -> Path:
    """Make a folder for this run's logs, and remove those of all but the last few runs."""
    home = state_dir() / "demo"
    home.mkdir(exist_ok=True)
    older = sorted(path for path in home.iterdir() if path.is_dir())
    for path in older[: 1 - RUNS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    logs = home / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir()
    return logs
