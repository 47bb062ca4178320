"""A lab in folders of a test: the target is a model, QEMU a process that does nothing.

A step can be the last one before `up` is killed: nothing that a process does reaches the world
then, not even what would take a failed step back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks import making, pools
from drivebay.errors import DrivebayError, StateError
from drivebay.rpc.client import Client
from drivebay.vm import ssh, store
from drivebay.vm.disks import offer
from drivebay.vm.lab import changes, planning, record, removal
from drivebay.vm.lab import vms as lab_vms
from drivebay.vm.lab.planning import Doings, plan_delete, plan_up
from drivebay.vm.lab.reading import read_lab
from drivebay.vm.lab.record import Labs, Record
from drivebay.vm.lab.site import Site
from drivebay.vm.qemu import Qemu
from drivebay.vm.several import Outcome
from drivebay.vm.spec import VmSpec
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import MIB, World

ABLE = ("memfd", "user-net", "vhost-user-blk", "vhost-user-block-driver", "nvme", "scsi", "ahci",
        "e1000")  # fmt: skip
QEMU = Qemu(Path("/q"), (11, 1), frozenset(ABLE), ("pc-q35-11.1",), "pc-q35-11.1")

LAB = """\
[pool.big]
file = "big.img"
size = "1G"
[disk.data]
size = "64M"
count = 2
[disk.own]
file = "own.img"
size = "32M"
[disk.part]
split = "own"
count = 2
[vm.web]
count = 2
image = "tiny"
memory = "128M"
disks = ["data"]
[vm.other]
disks = ["part-1"]
nets = []
"""


# One thing of each kind.
SMALL = """\
[pool.big]
file = "big.img"
size = "1G"
[disk.data]
size = "64M"
[disk.own]
file = "own.img"
size = "32M"
[disk.part]
split = "own"
count = 2
[vm.web]
image = "tiny"
disks = ["data", "part-1"]
"""


class Killed(BaseException):
    """What `kill -9` is: nothing of ours runs after it."""


class LabWorld:
    """One lab's file in the folder ``labs`` of a world."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.processes: list[subprocess.Popen[bytes]] = []
        self.folder = world.folder / "labs"
        self.folder.mkdir()
        self.file = self.folder / "four.toml"
        self.started: list[str] = []
        self.said: list[str] = []
        self.failing: set[str] = set()  # VMs that do not start
        world.image("tiny")
        patch.setattr(lab_vms, "find_qemu", lambda named: QEMU)
        patch.setattr(planning, "start_several", self._start)
        patch.setattr(planning, "stop_several", self._stop)
        # What takes long, and has tests of its own.
        patch.setattr(ssh, "make_keys", lambda folder, uuid: folder.mkdir())
        patch.setattr(os, "fsync", lambda descriptor: None)

    def _start(self, vms: Any, names: Sequence[str], socket: str) -> Iterator[Outcome[None]]:
        for name in names:
            if name in self.failing:
                yield Outcome(name, error=StateError("no port", hint="another port"))
                continue
            self.started.append(name)
            self.processes.append(subprocess.Popen(["sleep", "600"]))
            vm = vms.load(name)
            offer(self.world.client, name, vm.spec.disks)
            seem_to_run(vm, self.processes[-1])
            yield Outcome(name)

    def _stop(self, vms: Any, names: Sequence[str]) -> Iterator[Outcome[None]]:
        for name in names:
            vms.load(name).running_file.unlink(missing_ok=True)
            yield Outcome(name)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def stop(self, *names: str) -> None:
        for name in names or self.world.vms.names():
            self.world.vms.load(name).running_file.unlink(missing_ok=True)

    def site(self, name: str = "four") -> Site:
        labs = Labs()
        there = labs.load(name) or Record(labs.path(name), str(self.file))
        labs.folder.mkdir(exist_ok=True, parents=True)
        return Site(name, there, self.world.client, self.world.socket, say=self.said.append)

    def plan(self, text: str | None = LAB, *recreate: str, prune: bool = False) -> Doings:
        if text is not None:
            self.file.write_text(text)
        return plan_up(self.site(), read_lab(self.file), recreate, prune=prune)

    def up(self, text: str | None = LAB, *recreate: str, prune: bool = False) -> list[str]:
        """The steps that were done."""
        self.said.clear()
        doings = self.plan(text, *recreate, prune=prune)
        doings.up.settle()
        doings.plan.run()
        assert self.said == doings.plan.texts
        return self.said[:]

    def killed(self) -> None:
        """What is left of folders that were being made or removed, which nobody lists."""
        for rest in self.world.vms.folder.glob(".new-*"):
            shutil.rmtree(rest)

    def delete(self) -> list[str]:
        site = self.site()
        plan = plan_delete(site)
        plan.run()
        Labs().delete(site.record)
        return plan.texts

    def spec(self, name: str) -> VmSpec:
        return self.world.vms.load(name).spec

    def picture(self) -> dict[str, Any]:
        """All that there is, without what is chosen anew each time."""
        target = self.world.target
        return {
            "bases": sorted(target.bases),
            "stores": sorted(target.stores),
            "volumes": {f"{store}/{name}": one.clusters
                        for (store, name), one in sorted(target.volumes.items())},
            "controllers": sorted(entry["ctrlr"] for entry in target.controllers),
            "files": {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())},
            "vms": {name: [(disk.name, disk.bdev, disk.shared) for disk in self.spec(name).disks]
                    for name in self.world.vms.names()},
        }  # fmt: skip


def refused(lab: LabWorld, kind: type[DrivebayError], said: str, text: str) -> str:
    """The hint of an edited file that changes nothing."""
    before = lab.picture()
    lab.file.write_text(text)
    with pytest.raises(kind, match=said) as caught:
        lab.plan(None)
    lab.file.write_text(LAB)
    assert lab.picture() == {**before, "files": {**before["files"], "four.toml": len(LAB)}}
    return str(caught.value.hint)


class LastStep:
    """Kills the process of `up` at its step number ``at``, before or after its effect.

    Or interrupts it as Ctrl-C does: what takes a step back is done then.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int, *, how: type[BaseException] = Killed
    ) -> None:
        self.left = at
        self.how = how
        for owner, name in (
            (Client, "call"),
            (record, "write_private"),
            (store, "write_private"),
            (changes, "write_private"),
            (pools, "make_sparse_file"),
            (making, "make_sparse_file"),
            (pools, "remove_file"),
            (making, "remove_file"),
            (record, "remove_file"),
            (removal, "remove_file"),
            (store.Vms, "create"),
            (store.Vms, "delete"),
        ):
            patch.setattr(owner, name, self._hook(getattr(owner, name)))

    def _hook(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*words: Any, **more: Any) -> Any:
            self._count()
            result = real(*words, **more)
            self._count()
            return result

        return act

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.how is Killed):
            raise self.how


__all__ = ["LAB", "MIB", "SMALL", "Killed", "LabWorld", "LastStep", "refused"]
