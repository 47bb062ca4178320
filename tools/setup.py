#!/usr/bin/env python3
"""Make this clone ready to run: Debian packages, a virtual environment, the build.

    tools/setup.py            what `make setup` does: a normal install in .venv
    tools/setup.py dev        an editable install in .venv-dev (`make dev`)
    tools/setup.py asan       checks and sanitizers in .venv-asan (`make asan`)

Says what it installs, does only what is missing, and holds a lock on the clone
meanwhile, so several makes may run at once. A normal install is the rule: an
editable one rebuilds when it is imported, and two processes that start together
would build into each other.

Runs with the standard library only, before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_LIST = ROOT / "packaging" / "debian-packages.txt"
# What an install is made of; a change below any of these builds again.
BUILD_INPUTS = (
    *("src", "meson.build", "pyproject.toml", "LICENSE"),
    *("tools/list_sources.py", "tools/translate.py"),
)


class SetupError(Exception):
    """Something a person has to mend; ``hint`` is what to type."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Flavour:
    """One way to install: where, and with which options for pip."""

    venv: Path
    build_dir: str
    pip_options: tuple[str, ...] = ()


FLAVOURS = {
    "release": Flavour(ROOT / ".venv", "build/release"),
    "dev": Flavour(ROOT / ".venv-dev", "build/dev", ("--editable",)),
    "asan": Flavour(
        ROOT / ".venv-asan",
        "build/asan",
        (
            "-Csetup-args=-Dbuildtype=debug",
            "-Csetup-args=-Db_sanitize=address,undefined",
            "-Csetup-args=-Db_lundef=false",
        ),
    ),
}


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    """Run one step; its output is shown only when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        sys.stdout.write(done.stdout)
        raise SetupError(f"'{' '.join(words[:3])} …' failed with exit code {done.returncode}")


@contextmanager
def locked() -> Iterator[None]:
    """Hold the clone's own folder locked; nothing is left behind when we die."""
    descriptor = os.open(ROOT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is setting up this clone; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def wanted_packages() -> list[str]:
    lines = PACKAGE_LIST.read_text().splitlines()
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def missing_packages() -> list[str]:
    wanted = wanted_packages()
    query = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n", *wanted],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it complains about each one that it does not know
    )
    present = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in present]


def become_root(packages: Sequence[str]) -> list[str]:
    """The words that run a command as root, or a SetupError that says what to type."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    # Without a terminal sudo could not ask for a password.
    if sudo and (sys.stdin.isatty() or subprocess.run([sudo, "-n", "true"]).returncode == 0):
        return [sudo]
    raise SetupError(
        f"Debian packages are missing and installing them needs root: {' '.join(packages)}; "
        "this user is not root and there is no sudo that answers",
        "as root, type: apt-get install --no-install-recommends " + " ".join(packages),
    )


def install_packages() -> None:
    if shutil.which("dpkg-query") is None:
        say(f"this is not Debian; it needs the counterparts of: {' '.join(wanted_packages())}")
        return
    packages = missing_packages()
    if not packages:
        return
    prefix = become_root(packages)
    say(f"installing Debian packages: {' '.join(packages)}")
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    apt += ["-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    # The lists of a fresh machine are empty or old; only then fetch them.
    known = subprocess.run(
        [*apt, "install", "--dry-run", *packages],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if known.returncode == 0:
        try:
            run(install)
            return
        except SetupError:
            say("that failed; trying once more with fresh package lists")
    run([*apt, "update"])
    run(install)


def digest(*parts: str, files: Sequence[Path] = ()) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() + b"\0")
    for path in files:
        state.update(str(path.relative_to(ROOT)).encode() + b"\0")
        state.update(path.read_bytes() + b"\0")
    return state.hexdigest()


def build_inputs() -> list[Path]:
    found: list[Path] = []
    for name in BUILD_INPUTS:
        path = ROOT / name
        if path.is_dir():
            found += (p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        else:
            found.append(path)
    return sorted(found)


def requirements() -> list[str]:
    import tomllib  # here, so that an older Python still reaches our own sentence

    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [found["project"]["dependencies"], *found["dependency-groups"].values()]
    return [requirement for group in groups for requirement in group]


def stamp_is(path: Path, value: str) -> bool:
    return path.is_file() and path.read_text() == value


def make_environment(flavour: Flavour) -> str:
    """Create or refresh the virtual environment; returns what identifies it.

    Only the first has packages of its own: the others find them there, beside a drivebay of
    their own, which comes first.
    """
    wanted = requirements()
    identity = digest(sys.version, sys.base_prefix, *wanted)
    stamp = flavour.venv / "drivebay-environment"
    if stamp_is(stamp, identity):
        return identity
    first = FLAVOURS["release"]
    if flavour is first:
        say(f"virtual environment in {flavour.venv.name}: {', '.join(wanted)}")
        run([sys.executable, "-m", "venv", "--clear", flavour.venv])
        pip = [str(flavour.venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "install", *wanted])
    else:
        make_environment(first)
        say(f"virtual environment in {flavour.venv.name}, with the packages of {first.venv.name}")
        run([sys.executable, "-m", "venv", "--clear", "--without-pip", flavour.venv])
        (packages_of(flavour.venv) / "packages.pth").write_text(f"{packages_of(first.venv)}\n")
        for program in (first.venv / "bin").iterdir():
            link = flavour.venv / "bin" / program.name
            if program.name != "drivebay" and not os.path.lexists(link):
                link.symlink_to(program)
    stamp.write_text(identity)
    return identity


def packages_of(venv: Path) -> Path:
    (found,) = venv.glob("lib/python3*/site-packages")
    return found


def install(flavour: Flavour, environment: str) -> None:
    identity = digest(environment, *flavour.pip_options, files=build_inputs())
    stamp = flavour.venv / "drivebay-install"
    if stamp_is(stamp, identity):
        return
    first = "" if (ROOT / flavour.build_dir).is_dir() else "; the first time takes a minute or more"
    say(f"building drivebay in {flavour.build_dir}, installing into {flavour.venv.name}{first}")
    stamp.unlink(missing_ok=True)
    # The build finds meson and ninja on PATH, and no other interpreter's.
    env = dict(os.environ, PATH=f"{flavour.venv / 'bin'}:{os.environ['PATH']}")
    command: list[str | Path] = [flavour.venv / "bin" / "python", "-m", "pip"]
    command += ["--disable-pip-version-check", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", f"-Cbuild-dir={flavour.build_dir}", *flavour.pip_options, "."]
    run(command, env)
    stamp.write_text(identity)


def prepare(flavour: Flavour) -> str:
    """Packages of Debian and of Python: beside each other, since both wait for the network."""
    if importlib.util.find_spec("ensurepip") is None:  # it comes with python3-venv
        install_packages()
        return make_environment(flavour)
    if shutil.which("dpkg-query") is not None and (packages := missing_packages()):
        become_root(packages)  # who may not is told at once
    with ThreadPoolExecutor(max_workers=1) as pool:
        environment = pool.submit(make_environment, flavour)
        install_packages()
        return environment.result()


def main() -> int:
    flavour = FLAVOURS[sys.argv[1] if len(sys.argv) > 1 else "release"]
    started = time.monotonic()
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 (this script runs before pip could check)
            raise SetupError(
                f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}",
                "make PYTHON=/path/to/python3.11 setup",
            )
        with locked():
            install(flavour, prepare(flavour))
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    say(f"ready in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
