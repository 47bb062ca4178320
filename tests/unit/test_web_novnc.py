"""web/novnc.py: where the client is taken from; apt is a stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from drivebay.errors import HostError, NotFound
from drivebay.web import novnc
from drivebay.web.novnc import find_novnc


def client_in(folder: Path) -> Path:
    (folder / "core").mkdir(parents=True)
    (folder / "core/rfb.js").write_text("// a client")
    return folder


@pytest.fixture
def said(own_folders: None) -> list[str]:
    """What is said of the progress."""
    return []


def test_one_that_is_installed_is_taken(tmp_path: Path, said: list[str]) -> None:
    there = client_in(tmp_path / "there")
    assert find_novnc(said.append, there) == there
    assert said == []


def test_debians_is_fetched_once(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(work: Path, packages: Sequence[str]) -> Path:
        assert packages == ["novnc"]
        client_in(work / "tree/usr/share/novnc")
        return work / "tree"

    monkeypatch.setattr(novnc, "unpack_packages", unpack)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    for _ in range(2):
        found = find_novnc(said.append, tmp_path / "none")
        assert (found / "core/rfb.js").read_text() == "// a client"
    assert len(said) == 1
    assert sorted(each.name for each in found.parent.iterdir()) == ["lock", "tree"]


def test_where_it_can_not_be_fetched_the_package_is_named(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: Path, packages: Sequence[str]) -> Path:
        raise HostError("cannot download novnc", 101)

    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NotFound, match="noVNC, .*, is not on this host$") as error:
        find_novnc(said.append, tmp_path / "none")
    assert "novnc" in str(error.value.hint)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(novnc, "unpack_packages", fail)
    with pytest.raises(NotFound, match="can't be fetched: cannot download novnc"):
        find_novnc(said.append, tmp_path / "none")
    monkeypatch.setattr(novnc, "unpack_packages", lambda work, packages: work)
    with pytest.raises(NotFound, match="holds no core/rfb.js"):
        find_novnc(said.append, tmp_path / "none")
    assert [each.name for each in (tmp_path / "cache/drivebay/novnc").iterdir()] == ["lock"]
