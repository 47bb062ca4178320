"""Images under clones in a real target: they stay while anything reads from them."""

from __future__ import annotations

import json
import random
import subprocess
from typing import Any

from drivebay.vm.images.store import Images
from drivebay.vm.images.users import bdev_parameters
from tests.e2e.bay import MIB, SECTORS, Bay, pattern

CONTENT = random.Random(3).randbytes(MIB)


def rpc(bay: Bay, method: str, **parameters: Any) -> Any:
    return bay.target.rpc(method, **parameters)


def test_an_image_lives_as_long_as_its_clones(bay: Bay) -> None:
    raw = bay.folder / "raw"
    raw.write_bytes(CONTENT)
    disk = bay.folder / "web.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    bay.ok("image", "import", str(disk))
    image = Images().get("web")
    bay.ok("pool", "create", "p", "--file", str(bay.folder / "p.img"), "--size", "1G")
    rpc(bay, "bdev_aio_create", **bdev_parameters(image))
    rpc(bay, "bdev_lvol_clone_bdev", bdev="image-web", lvs_name="p", clone_name="one")
    assert bay.read("p/one", 0, 4096) == CONTENT[:4096]
    bay.write("p/one", 0, pattern(1))
    # A clone made by hand, of the clone: the image lies below its snapshot.
    bay.ok("disk", "clone", "one", "two")

    for crash in (False, True):
        bay.restart(crash=crash)
        assert bay.read("p/one", 0, 4096) == pattern(1)
        assert bay.read("p/two", 1024, 4096) == CONTENT[1024 * 512 : 1024 * 512 + 4096]
        for words in (["delete", "web", "--yes"], ["resize", "web", "8M"]):
            said = bay.refused("image", *words)
            assert "disk 'p/one', disk 'p/two' read from it" in said
        users = json.loads(bay.ok("image", "info", "web", "--json"))["users"]
        assert users == ["disk 'p/one'", "disk 'p/two'"]

    # While the image is not open in the target, its clones are not there: they still count.
    rpc(bay, "bdev_aio_delete", name="image-web")
    said = bay.refused("image", "delete", "web", "--yes")
    assert all(f"'p/{name}'" in said for name in ("one", "two", "one@two"))
    assert "begin with is not open in the target" in said
    rpc(bay, "bdev_aio_create", **bdev_parameters(image))
    assert bay.read("p/one", 0, 4096) == pattern(1)

    # Independent by now, so it needs the image no more.
    rpc(bay, "bdev_lvol_inflate", name="p/two")
    bay.ok("disk", "delete", "one", "--with-snapshots", "--yes")
    assert json.loads(bay.ok("image", "info", "web", "--json"))["users"] == []
    bay.ok("image", "resize", "web", "8M")
    assert image.path.stat().st_size == 8 * MIB
    rpc(bay, "bdev_aio_create", **bdev_parameters(Images().get("web")))
    bay.ok("image", "delete", "web", "--yes")
    assert not image.path.exists()
    names = [bdev["name"] for bdev in rpc(bay, "bdev_get_bdevs")]
    assert "image-web" not in names
    assert bay.read("p/two", SECTORS - 8, 4096) == CONTENT[-4096:]
    bay.restart(crash=True)
    assert bay.read("p/two", SECTORS - 8, 4096) == CONTENT[-4096:]
