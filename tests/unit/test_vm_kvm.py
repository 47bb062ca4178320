"""vm/kvm.py: what the host shows is enough to rule KVM out; a trial decides the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drivebay.vm import kvm
from drivebay.vm.kvm import Accelerator, choose_accelerator, static_objection

INTEL = "processor : 0\nflags\t\t: fpu vme vmx sse2\n"
AMD = "processor : 0\nflags\t\t: fpu vme svm sse2\n"
NEITHER = "processor : 0\nflags\t\t: fpu vme sse2 svm_lock\nbugs\t\t: vmx\n"


def objection(
    folder: Path, cpuinfo: str, *, module: str = "kvm_intel", mode: int = 0o660
) -> str | None:
    (folder / "kvm").touch()
    (folder / "kvm").chmod(mode)
    (folder / "cpuinfo").write_text(cpuinfo)
    (folder / "module" / module).mkdir(parents=True)
    return static_objection(str(folder / "kvm"), str(folder / "cpuinfo"), str(folder / "module"))


@pytest.mark.parametrize("cpuinfo", [INTEL, AMD], ids=["intel", "amd"])
def test_a_processor_with_virtualisation_is_not_ruled_out(tmp_path: Path, cpuinfo: str) -> None:
    assert objection(tmp_path, cpuinfo) is None


def test_flags_are_whole_words_of_the_flags_line(tmp_path: Path) -> None:
    assert objection(tmp_path, NEITHER) == "the processor shows neither vmx nor svm"


def test_kvm_pvm_is_ruled_out(tmp_path: Path) -> None:
    assert "kvm_pvm" in str(objection(tmp_path, INTEL, module="kvm_pvm"))


@pytest.mark.needs_root
def test_a_device_for_root_alone_is_ruled_out_as_qemu_drops_root(tmp_path: Path) -> None:
    assert "QEMU does not run as root" in str(objection(tmp_path, INTEL, mode=0o600))


def test_no_device_is_said(tmp_path: Path) -> None:
    assert static_objection(str(tmp_path / "kvm")) == f"no {tmp_path / 'kvm'}"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A host that shows nothing against KVM; counts the trials, which succeed."""
    done: list[int] = []

    def probe() -> Accelerator:
        done.append(1)
        return Accelerator("kvm", "it ran")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kvm, "static_objection", lambda: None)
    monkeypatch.setattr(kvm, "_probe", probe)
    return done


def test_the_trial_is_remembered(trials: list[int]) -> None:
    assert choose_accelerator() == choose_accelerator() == Accelerator("kvm", "it ran")
    assert len(trials) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "another boot"}'])
def test_a_damaged_or_old_memory_means_a_new_trial(
    trials: list[int], tmp_path: Path, text: str
) -> None:
    memory = tmp_path / "drivebay" / "accelerator.json"
    memory.parent.mkdir()
    memory.write_text(text)
    assert choose_accelerator().name == "kvm"
    assert len(trials) == 1
    assert json.loads(memory.read_text())["name"] == "kvm"
