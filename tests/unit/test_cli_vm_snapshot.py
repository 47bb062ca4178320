"""`drivebay vm snapshot|snapshots|revert`: what they print, ask and refuse; and what becomes of
snapshots when their VM is cloned or deleted.
"""

from __future__ import annotations

import pytest

from drivebay.cli.vm_snapshot import MEMORY
from drivebay.vm.snapshots import WAS_OFF
from drivebay.vm.spec import DiskSpec
from tests.unit.command import Done, Run, run_command
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; there is a VM 'web' with two disks, which is off."""
    world.pool()
    names = ("system", "data")
    disks = [DiskSpec(name, world.volume(f"web-{name}"), made=True) for name in names]
    world.vm("web", *disks)

    def words(*given: str) -> Done:
        return run_command(capsys, "vm", *given, "-s", world.socket)

    return words


def test_one_is_taken_shown_and_deleted(run: Run, world: World) -> None:
    assert "VM 'web' has no snapshot" in run("snapshots", "web").out
    taken = run("snapshot", "web", "before")
    assert taken.out.splitlines() == [
        "VM 'web' has the snapshot 'before': p/web-system@before, p/web-data@before",
        f"  its file systems are {WAS_OFF}; {MEMORY}",
        "  go back: drivebay vm revert web before",
    ]
    assert run("snapshots", "web", "-q").out == "before\n"
    assert "snapshots  before" in run("info", "web").out
    head, line = run("snapshots", "web").out.splitlines()
    assert head.split() == ["snapshot", "taken", "disks", "holds", "file", "systems"]
    assert "system, data  0 bytes" in line
    asked = run("snapshot", "web", "before", "--delete")
    assert asked.code == 1
    assert "add --yes" in asked.err
    done = run("snapshot", "web", "before", "--delete", "--yes")
    assert done.out == "VM 'web' has the snapshot 'before' no more\n"
    assert world.volumes() == ["p/web-data", "p/web-system"]


def test_json(run: Run) -> None:
    taken = run("snapshot", "web", "a", "--json").json
    assert taken["vm"] == "web"
    assert taken["volumes"] == {"system": "p/web-system@a", "data": "p/web-data@a"}
    (listed,) = run("snapshots", "web", "--json").json
    assert (listed["snapshot"], listed["complete"], listed["holds"]) == ("a", True, 0)
    assert run("revert", "web", "a", "--yes", "--json").json == {
        "vm": "web", "reverted": "a", "facts": []}  # fmt: skip
    deleted = run("snapshot", "web", "a", "--delete", "--yes", "--json").json
    assert deleted == {"vm": "web", "deleted": "a"}


def test_a_dry_run_changes_nothing(run: Run, world: World) -> None:
    assert run("snapshot", "web", "a", "--dry-run").out.startswith("would take the snapshots")
    run("snapshot", "web", "a")
    world.target.calls.clear()
    shown = run("revert", "web", "a", "--dry-run").out.splitlines()
    assert "would let 'web-data' begin with 'web-data@a'" in shown
    deleted = run("snapshot", "web", "a", "--delete", "--dry-run").out.splitlines()
    assert deleted[-1] == "would forget the snapshot 'a'"
    assert world.target.calls == []


def test_the_way_back_is_asked_about_and_gone(run: Run, world: World) -> None:
    run("snapshot", "web", "a")
    refused = run("revert", "web", "a")
    assert refused.code == 1
    assert "Lose what was written to the disks of VM 'web' since 'a'?" in refused.err
    assert run("revert", "web", "a", "--yes").out.startswith("VM 'web' is as it was at 'a', 20")
    nosuch = run("revert", "web", "b", "--yes")
    assert nosuch.code == 1
    assert nosuch.err.splitlines()[1] == "hint: it has: a"


def test_a_running_vm_does_not_go_back(run: Run, world: World) -> None:
    run("snapshot", "web", "a")
    with idle_process() as process:
        seem_to_run(world.vms.load("web"), process)
        refused = run("revert", "web", "a", "--yes")
    assert refused.code == 1
    assert "VM 'web' runs, and its disks can't change under it" in refused.err
    assert "hint: drivebay vm stop web" in refused.err


def test_one_whose_machine_nobody_knows_is_left_alone(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.disks.LETTING_GO_SECONDS", 0.0)
    run("snapshot", "web", "a")
    world.target.show("vm.web.system", "p/web-system", sessions=1)
    for words in (("revert", "web", "a", "--yes"), ("snapshot", "web", "b")):
        refused = run(*words)
        assert "and yet a machine is connected to its controller 'vm.web.system'" in refused.err


def test_the_list_says_what_is_missing_and_needs_no_target(run: Run, world: World) -> None:
    run("snapshot", "web", "b")
    run("snapshot", "web", "a")
    names = [line.split()[0] for line in run("snapshots", "web").out.splitlines()]
    assert names[0] == "snapshot"
    assert sorted(names[1:]) == ["a", "b"]
    del world.target.volumes["p", "web-data@a"]
    gone = [line for line in run("snapshots", "web").out.splitlines() if line.startswith("a ")]
    assert "a part is gone" in gone[0]
    (world.vms.load("web").snapshots / "b/snapshot.toml").write_text("?")
    broken = run("snapshots", "web")
    assert "warning: snapshot.toml of snapshot 'b' of 'web' is not TOML" in broken.err
    world.socket = "/nowhere"
    assert "system, data  -" in run("snapshots", "web").out


def test_a_deleted_vm_takes_its_snapshots_along(run: Run, world: World) -> None:
    for tag in ("a", "b"):
        run("snapshot", "web", tag)
    run("revert", "web", "a", "--yes")
    assert run("delete", "web", "--yes").code == 0
    assert world.volumes() == []


def test_clones_of_a_vm_with_snapshots_have_none_and_outlive_it(run: Run, world: World) -> None:
    run("snapshot", "web", "a")
    assert run("clone", "web", "copy").code == 0
    assert run("snapshots", "copy", "-q").out == ""
    assert run("delete", "web", "--yes").code == 0
    left = [name.partition("@")[0] for name in world.volumes()]
    assert {"p/copy-system", "p/copy-data"} <= set(left)
    assert run("snapshot", "copy", "a").code == 0
    assert run("revert", "copy", "a", "--yes").code == 0
    assert run("delete", "copy", "--yes").code == 0
    assert world.volumes() == [], "what the clones needed of it went with the last of them"
