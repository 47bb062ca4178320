"""`drivebay vm create`: what vm.toml could not hold is refused before anything is made."""

from __future__ import annotations

import pytest

from drivebay.cli.vm import main
from drivebay.errors import UsageError
from tests.unit.vm_world import World

pytestmark = pytest.mark.needs_qemu


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cpus 0", "'cpus' should be from 1 to 256"),
        ("--memory 5M", "at least 16M"),
        ("--memory 1048577", "no whole number of MiB"),
        ("--firmware uefi --memory 383M", "UEFI needs 384 MiB"),
        ("--disk 1M,name=a..b", "can't be the name of a disk"),
    ],
)
def test_a_value_that_could_not_be_read_again_makes_no_vm(
    world: World, words: str, said: str
) -> None:
    world.pool()
    line = ["create", "web", "--image", "none", "--disk", "64M", "-s", world.socket]
    with pytest.raises(UsageError, match=said):
        main([*line, *words.split()])
    assert world.volumes() == []
    assert world.vms.names() == []
