"""disks/places.py: a finished file gets its name, and replaces nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from drivebay.disks.places import give_name


@pytest.fixture(params=["links", "no links"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Also as on a FAT file system, which only root could mount: there links are refused."""

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    if request.param == "no links":
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "fresh").write_text("new")
    return tmp_path


def test_a_file_gets_its_name(folder: Path) -> None:
    give_name(folder / "fresh", folder / "name")
    assert [(each.name, each.read_text()) for each in folder.iterdir()] == [("name", "new")]


def test_what_has_the_name_already_stays(folder: Path) -> None:
    (folder / "name").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        give_name(folder / "fresh", folder / "name")
    assert (folder / "name").is_symlink()
    assert (folder / "fresh").read_text() == "new"


def test_a_folder_that_is_gone_is_said(folder: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        give_name(folder / "fresh", folder / "none" / "name")
    assert (folder / "fresh").read_text() == "new"
