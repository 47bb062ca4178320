"""`drivebay up` and `down`: what they say, and which lab they mean."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from drivebay.cli import down, up
from drivebay.errors import DrivebayError, HostError, InUse, NotFound, StateError
from drivebay.vm import several
from drivebay.vm.lab.model import LabMistake
from drivebay.vm.lab.record import Labs
from drivebay.vm.several import Outcome
from tests.unit.vm_lab_world import LAB, SMALL, LabWorld
from tests.unit.vm_world import World


@pytest.fixture
def lab(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabWorld]:
    made = LabWorld(world, monkeypatch)
    made.file.write_text(SMALL)
    yield made
    made.close()


def run_up(lab: LabWorld, *words: str) -> None:
    assert up.main([str(lab.file), "-s", lab.world.socket, *words]) == 0


def run_down(lab: LabWorld, *words: str, what: str | None = None) -> None:
    assert down.main([what or str(lab.file), "-s", lab.world.socket, *words]) == 0


@pytest.fixture
def stops(lab: LabWorld, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What `down` was to stop, and how; VMs called 'stuck' do not stop."""
    asked: list[tuple[object, ...]] = []

    def stop(vms: object, names: list[str], *, force: bool, timeout_s: float) -> object:
        asked.append((names, force, timeout_s))
        for name in names:
            if lab.spec(name).cpus == 7:
                yield Outcome(name, error=StateError("stuck", hint="pull"))
            else:
                lab.stop(name)
                yield Outcome(name, "by force" if force else "off")

    monkeypatch.setattr(several, "stop_several", stop)
    return asked


def test_up_says_what_it_does_and_then_that_nothing_is_to_do(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run_up(lab, "--dry-run")
    dry = capsys.readouterr().out.splitlines()
    assert dry[0].startswith("would make pool 'four-big' of 1 GiB on ")
    assert dry[-1] == "would start VM four-web"
    assert lab.world.target.calls == []
    assert Labs().names() == []
    run_up(lab)
    said = capsys.readouterr().out.splitlines()
    assert [f"would {line}" for line in said[:-1]] == dry
    assert said[-1] == "lab 'four' is up; to get in: drivebay vm console four-web"
    run_up(lab)
    assert capsys.readouterr().out == f"lab 'four' is as '{lab.file}' says: nothing to do\n"
    run_up(lab, "-q")
    assert capsys.readouterr().out == "four-web\n"
    run_up(lab, "--dry-run")
    assert "nothing to do" in capsys.readouterr().out


def test_up_as_json(lab: LabWorld, capsys: pytest.CaptureFixture[str]) -> None:
    run_up(lab, "--json", "--dry-run")
    assert len(json.loads(capsys.readouterr().out)["would"]) == 6
    run_up(lab, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["lab"], shown["file"], len(shown["did"])) == ("four", str(lab.file), 6)
    (vm,) = shown["vms"]
    assert (vm["name"], vm["state"], vm["pending"]) == ("four-web", "running", [])
    assert vm["forward"][0].endswith(":22")


def test_what_waits_for_a_restart_is_told_each_time(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run_up(lab)
    lab.file.write_text(SMALL + 'memory = "256M"\n')
    for _ in range(2):
        capsys.readouterr()
        run_up(lab)
        said = capsys.readouterr().out
        assert "VM 'four-web' waits for a restart: memory" in said
        assert "restart it: drivebay vm restart four-web" in said


def test_what_is_promised_beyond_the_pool_is_warned_of(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.file.write_text(SMALL.replace('"64M"', '"1G"'))
    run_up(lab)
    assert "of pool 'four-big' is promised to its disks" in capsys.readouterr().err


def test_what_left_the_file_is_named_and_prune_asks(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.file.write_text(LAB)
    run_up(lab)
    lab.file.write_text(LAB.partition("[vm.other]")[0])
    run_up(lab)
    assert "not in the file any more: VM 'four-other'; --prune" in capsys.readouterr().out
    with pytest.raises(StateError, match="nobody can be asked without a terminal"):
        run_up(lab, "--prune")
    assert "four-other" in lab.world.vms.names()
    run_up(lab, "--prune", "--yes")
    assert "four-other" not in lab.world.vms.names()
    with pytest.raises(StateError, match="nobody can be asked"):
        run_up(lab, "--recreate", "web-1")


def test_an_up_that_fails_says_that_the_next_goes_on(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.world.target.failing.add("bdev_split_create")
    with pytest.raises(DrivebayError, match="Input/output error"):
        run_up(lab)
    assert "the next 'drivebay up' goes on from there" in capsys.readouterr().err


def test_one_name_is_one_file(lab: LabWorld) -> None:
    run_up(lab)
    other = lab.folder / "other.toml"
    other.write_text(f'name = "four"\n{SMALL}')
    for command in (up, down):
        with pytest.raises(StateError, match="the lab 'four' is that of '.*/four.toml'") as caught:
            command.main([str(other), "-s", lab.world.socket])
        assert 'name = "…"' in str(caught.value.hint)


def test_one_command_of_a_lab_at_a_time(lab: LabWorld) -> None:
    run_up(lab)
    with Labs().locked("four"):
        for command in (up, down):
            with pytest.raises(InUse, match="brings lab 'four' up or down right now"):
                command.main([str(lab.file), "-s", lab.world.socket])


def test_down_stops_the_labs_vms_alone_and_keeps_them(
    lab: LabWorld, capsys: pytest.CaptureFixture[str], stops: list[tuple[object, ...]]
) -> None:
    run_up(lab)
    lab.world.vm("four-mine")  # of no lab
    capsys.readouterr()
    run_down(lab, "--dry-run")
    assert capsys.readouterr().out == "would stop VM 'four-web'\n"
    assert stops == []
    run_down(lab, "--timeout", "5")
    assert capsys.readouterr().out == "VM 'four-web' is off\n"
    assert stops == [(["four-web"], False, 5.0)]
    run_down(lab)
    assert capsys.readouterr().out == "lab 'four' is down already\n"
    assert lab.world.vms.names() == ["four-mine", "four-web"]
    run_up(lab)
    capsys.readouterr()
    run_down(lab, "--force", "--json")
    assert json.loads(capsys.readouterr().out) == {"lab": "four", "ended": {"four-web": "by force"}}


def test_down_tells_who_does_not_stop(lab: LabWorld, stops: list[tuple[object, ...]]) -> None:
    lab.file.write_text(SMALL + "cpus = 7\n")
    run_up(lab)
    with pytest.raises(StateError, match="VM 'four-web': stuck") as caught:
        run_down(lab)
    assert caught.value.hint == "pull"


def test_down_delete_asks_lists_and_leaves_nothing(
    lab: LabWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run_up(lab)
    with pytest.raises(StateError, match="Delete lab 'four' with all that is on its disks"):
        run_down(lab, "--delete")
    assert "  - delete VM 'four-web' and its disk" in capsys.readouterr().err
    run_down(lab, "--delete", "--dry-run")
    assert "four-web" in lab.world.vms.names()
    run_down(lab, "--delete", "--yes")
    assert lab.world.vms.names() == []
    assert lab.world.volumes() == []
    with pytest.raises(NotFound, match="the lab 'four' has made nothing"):
        run_down(lab, "--delete", "--yes")


def test_down_means_the_file_that_made_a_lab_whatever_is_in_it_now(
    lab: LabWorld, stops: list[tuple[object, ...]]
) -> None:
    run_up(lab)
    lab.file.write_text("this is no TOML")
    with pytest.raises(LabMistake, match="no TOML"):
        run_up(lab)
    run_down(lab)
    lab.file.unlink()
    run_down(lab, what="four")
    with pytest.raises(HostError, match="can't read the lab's file"):
        run_down(lab, what="five")
    run_down(lab, "--delete", "--yes", what="four")
    assert Labs().names() == []
