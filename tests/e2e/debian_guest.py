"""The Debian image of the tests: built once by `drivebay image build debian`'s own code, kept.

It takes two minutes, so a run of the tests that will want it starts building at once, in a
process of low priority beside the first tests (conftest.py runs this file), and the fixture
waits for what is left. A lock makes sure that one builds and all others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from drivebay.vm.images import bootable, debian
from drivebay.vm.places import cache_dir

END_SECONDS = 90
RECIPE = (bootable, debian)


def debian_image(say: Callable[[str], None] = print) -> Path:
    """Return the raw image, which nobody may change; built when there is none of this recipe."""
    home = _home()
    path = home / f"{_key()}.raw"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in (*home.glob("*.raw"), *home.glob(".new-*")):
                subprocess.run(["rm", "-rf", left], check=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as name:
                built = debian.build_debian(Path(name), say)
                built.raw.chmod(0o444)
                built.raw.rename(path)
    return path


def start_building() -> subprocess.Popen[bytes] | None:
    """Build in the background, unless the image is there; what it says is of no interest.

    If it fails, the fixture tries again, and shows why.
    """
    if (_home() / f"{_key()}.raw").exists():
        return None
    return subprocess.Popen(
        ["nice", "-n", "10", sys.executable, "-m", "tests.e2e.debian_guest"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end_building(process: subprocess.Popen[bytes]) -> None:
    """After the last test; tests that failed early may have left it at work."""
    process.send_signal(signal.SIGINT)
    process.wait(END_SECONDS)


def _home() -> Path:
    home = cache_dir() / "debian-guest"
    home.mkdir(exist_ok=True)
    return home


def _key() -> str:
    """Of what is built and how: the release of this machine and the text of our modules."""
    recipe = hashlib.sha256(platform.freedesktop_os_release()["VERSION_CODENAME"].encode())
    for module in RECIPE:
        assert module.__file__ is not None
        recipe.update(Path(module.__file__).read_bytes())
    return recipe.hexdigest()[:16]


if __name__ == "__main__":
    debian_image()
