"""vm/lab: a lab's file is refused whole, with the line of what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivebay.errors import HostError, UsageError
from drivebay.vm.lab.model import Lab, LabMistake
from drivebay.vm.lab.reading import lab_name_of, read_lab
from drivebay.vm.spec import Boot, ShareSpec

GIB = 1 << 30
EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"

FOUR = """\
[pool.big]
file = "big.img"
size = "300G"
[disk.data]
pool = "big"
size = "40G"
count = 4
[net.lan]
mode = "user"
[vm.web]
count = 4
image = "tiny"
memory = "128M"
cpus = 1
disks = ["data"]
nets = [{ net = "lan", forward = ["2222:22", "10.0.0.1:8080:80"] }]
"""


def read(folder: Path, text: str, name: str = "four.toml") -> Lab:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_lab(path)


def mistake(folder: Path, text: str, line: int | None, said: str) -> str:
    """The hint of a file that is refused, and says on which line."""
    with pytest.raises(LabMistake) as caught:
        read(folder, text)
    told = str(caught.value)
    assert told.startswith(f"four.toml, {'at its end' if line is None else f'line {line}'}: "), told
    assert said in told
    return caught.value.hint or ""


# ---- what is right ------------------------------------------------------------------------------


def test_counts_give_numbers_disks_and_ports(tmp_path: Path) -> None:
    lab = read(tmp_path, FOUR)
    assert lab.name == "four"
    (pool,) = lab.pools
    assert (pool.name, pool.file, pool.size) == ("big", tmp_path / "big.img", 300 * GIB)
    assert [(disk.name, disk.pool, disk.size) for disk in lab.disks] == [
        (f"data-{number}", "big", 40 * GIB) for number in (1, 2, 3, 4)
    ]
    assert [vm.name for vm in lab.vms] == ["web-1", "web-2", "web-3", "web-4"]
    assert [(disk.disk, disk.name) for vm in lab.vms for disk in vm.disks] == [
        (f"data-{number}", "data") for number in (1, 2, 3, 4)
    ]
    assert [[str(each) for net in vm.nets or () for each in net.forward] for vm in lab.vms] == [
        [f"127.0.0.1:{2222 + number}:22", f"10.0.0.1:{8080 + number}:80"] for number in range(4)
    ]
    assert {(vm.memory, vm.cpus, vm.image, vm.pool) for vm in lab.vms} == {
        (128 << 20, 1, "tiny", "big")
    }


def test_a_disk_may_be_as_large_as_its_pool(tmp_path: Path) -> None:
    assert read(tmp_path, FOUR.replace("40G", "300G")).disks[0].size == 300 * GIB


def test_a_count_of_one_gives_a_number_and_none_gives_none(tmp_path: Path) -> None:
    lab = read(tmp_path, '[vm.a]\nimage = "tiny"\n[vm.b]\ncount = 1\nimage = "tiny"\n')
    assert [vm.name for vm in lab.vms] == ["a", "b-1"]
    assert [(vm.pool, vm.memory, vm.cpus, vm.nets) for vm in lab.vms] == [(None,) * 4] * 2


def test_every_key_of_a_vm(tmp_path: Path) -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGAbHTLwcQVT1Jnvz4b2fJSB4vBwSWAi0yVSnmZ7nTWs a@b"
    (tmp_path / "key.pub").write_text(key + "\n")
    lab = read(
        tmp_path,
        """\
        name = "L1"
        [pool.p]
        device = "/dev/some"
        [disk.d]
        size = "1G"
        [disk.e]
        file = "e.img"
        [net.n]
        [vm.v]
        image = "debian"
        pool = "p"
        size = "5G"
        bus = "scsi"
        firmware = "uefi"
        kernel = "vmlinuz"
        initrd = "/initrd"
        append = "console=ttyS0"
        qemu = "bin/qemu"
        qemu_args = ["-device", "x"]
        shares = [".:here,ro", "/tmp"]
        autostart = true
        iso = "d.iso"
        user = "joe"
        ssh_keys = ["key.pub"]
        packages = ["nginx"]
        user_data = "ud.yaml"
        disks = ["d", { disk = "e", name = "old", bus = "nvme" }]
        nets = [{ net = "n", address = "10.0.2.50/24" }]
        """,
    )
    (vm,) = lab.vms
    assert vm.boot == Boot(str(tmp_path / "vmlinuz"), "/initrd", "console=ttyS0")
    assert (vm.qemu, vm.qemu_args) == (str(tmp_path / "bin/qemu"), ("-device", "x"))
    assert vm.shares == (ShareSpec(str(tmp_path), "here", True), ShareSpec("/tmp", "tmp"))
    assert (vm.autostart, vm.iso) == (True, tmp_path / "d.iso")
    assert (vm.user, vm.ssh_keys, vm.packages) == ("joe", (key,), ("nginx",))
    assert (vm.user_data, vm.size, vm.pool) == (tmp_path / "ud.yaml", 5 * GIB, "p")
    assert (vm.bus, vm.firmware) == ("scsi", "uefi")
    assert [(disk.disk, disk.name, disk.bus) for disk in vm.disks] == [
        ("d", "d", None), ("e", "old", "nvme"),
    ]  # fmt: skip
    (net,) = vm.nets or ()
    assert (net.address, net.gateway, net.dns) == (
        "10.0.2.50/24", "10.0.2.2", ("10.0.2.3",),
    )  # fmt: skip
    assert lab.full("v") == "L1-v"


def test_a_lab_is_called_as_it_says_or_as_its_file_or_folder(tmp_path: Path) -> None:
    text = '[vm.a]\nimage = "tiny"\n'
    folder = tmp_path / "stage"
    folder.mkdir()
    assert read(folder, text, "other.toml").name == "other"
    assert read(folder, text, "lab.toml").name == "stage"
    assert read(folder, f'name = "mine"\n{text}', "lab.toml").name == "mine"
    assert lab_name_of(folder / "lab.toml") == "mine"
    assert lab_name_of(folder / "other.toml") == "other"


def test_a_disk_that_all_share_and_a_disk_in_parts(tmp_path: Path) -> None:
    lab = read(
        tmp_path,
        """\
        [disk.whole]
        file = "w.img"
        size = "2G"
        [disk.part]
        split = "whole"
        count = 2
        size = "1G"
        [vm.a]
        disks = [{ disk = "part-1", shared = true }]
        [vm.b]
        count = 2
        disks = [{ disk = "part-1", shared = true }]
        """,
    )
    assert [(disk.name, disk.base, disk.part, disk.parts) for disk in lab.disks[1:]] == [
        ("part-1", "whole", 0, 2), ("part-2", "whole", 1, 2),
    ]  # fmt: skip
    assert [vm.disks[0].name for vm in lab.vms] == ["part-1"] * 3


# ---- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "said", "hint"),
    [
        # TOML itself
        ("[disk.data]", "[disk.data", 4, "this is no TOML", ""),
        ("[net.lan]", "[pool.big]", 8, "[pool.big] is there twice", ""),
        ('image = "tiny"', 'image = "tiny"\nimage = "b"', 13, "a key is there twice", ""),
        ('"10.0.0.1:8080:80"] }]', '"10.0.0.1:8080:80"] },', None, "this is no TOML", ""),
        # keys
        ("[pool.big]", "[poll.big]", 1, "a key that is unknown: 'poll'", "is 'pool' meant?"),
        ('size = "300G"', 'sise = "300G"', 3, "a key that is unknown: 'sise'", "'size' meant?"),
        ("image =", "imgae =", 12, "[vm.web] has a key that is unknown", "is 'image' meant?"),
        ("cpus = 1", 'password = "x"', 14, "holds no secrets", "vm set four-web --password"),
        ("cpus = 1", 'cpus = "1"', 14, "'cpus' is '1', and should be a number", ""),
        ("cpus = 1", "cpus = 0", 14, "'cpus' should be from 1 to 256", ""),
        ('memory = "128M"', 'memory = "3M"', 13, "at least 16M", ""),
        ('memory = "128M"', 'memory = "much"', 13, "'much' is not a size", ""),
        ('mode = "user"', 'mode = "bridge"', 8, "mode bridge needs an uplink", "--uplink eno1"),
        ('mode = "user"', 'mode = "other"', 9, "should be one of user", ""),
        ('image = "tiny"', 'image = "a b"', 12, "can't be the name of an image", ""),
        ('file = "big.img"', 'device = "sdb"', 2, "'device' should begin with '/'", ""),
        ('file = "big.img"', "", 1, "needs either 'file' or 'device'", 'file = "big.img"'),
        ("count = 4\nimage", "count = 0\nimage", 11, "'count' is 0, and should be from 1 to", ""),
        ('disks = ["data"]', "disks = [1]", 15, "'disks' should be names, or tables", ""),
        ('disks = ["data"]', 'disks = [{ disk = "data", x = 1 }]', 15, "unknown: 'x'", "known"),
        ('net = "lan", ', "", 16, "has no 'net'", ""),
        # names
        ("[vm.web]", "[vm.we_b]", 10, "'we_b' can't be the name of a vm", ""),
        ("[vm.web]", f"[vm.{'w' * 40}]", 10, "can't be the name of a VM: 1 to 40", "host name"),
        ("[net.lan]\n", "[disk.data-1]\nsize='1G'\n[net.lan]\n", 8, "'data-1' is there twice", ""),
        ("[net.lan]\n", '[vm.web-2]\nimage="t"\n[net.lan]\n', 12, "VM 'web-2' is there twice", ""),
        ("[net.lan]\n", "[disk.web-1-system]\nsize='1G'\n[net.lan]\n", 8, "the system disk of", ""),
        # what is missing
        ('pool = "big"', 'pool = "bigg"', 5, "there is no [pool.bigg]", "is 'big' meant?"),
        ('["data"]', '["dat"]', 15, "there is no [disk.dat]", "is 'data' meant?"),
        ('net = "lan"', 'net = "wan"', 16, "there is no [net.wan]", "is 'lan' meant?"),
        # sizes, parts, numbers
        ('size = "40G"', 'size = "301G"', 6, "'data-1' is 301 GiB large, and its pool", "larger"),
        ('image = "tiny"', 'image = "t"\nsize = "301G"', 13, "'web-1' is 301 GiB large", ""),
        ('size = "40G"', "", 4, "[disk.data] has no 'size'", 'size = "40G"'),
        ("count = 4\n[net", "count = 3\n[net", 15, "has 4 VMs, and 'data' has 3 disks", ""),
        ("count = 4\nimage", "image", 14, "'data' means 4 disks", "'data-1'"),
        ('["data"]', '["data-1"]', 15, "'data-1' is given to several VMs", "shared = true"),
        ('["data"]', '["data", "data"]', 15, "two disks of one name: data, data", ""),
        ('["data"]', '["data", {disk="data-1", name="b"}]', 15, "the disk 'data-1' twice", ""),
        ('"2222:22"', '"8079:22"', 16, "port 8080 leads to the VM 'web-1'", "counts up"),
        ('"2222:22"', '"65533:22"', 16, "would be port 65536 in the end", ""),
        ('"2222:22"', '"x:22"', 16, "'x:22' is no port forward", "2222:22"),
        ("net = ", 'address = "10.0.2.0/24", net = ', 16, "is the network itself", ""),
        ("cpus = 1", 'user = "a b"', 14, "not a user's name", ""),
        ("cpus = 1", 'shares = ["none"]', 14, "is not there", "mkdir"),
        ("cpus = 1", 'shares = [".:a", ".:a"]', 10, "two shares of one tag", ""),
        ("cpus = 1", 'initrd = "i"', 14, "'initrd' needs a 'kernel'", ""),
        ("cpus = 1", 'ssh_keys = ["none.pub"]', 14, "can't read the public key", ""),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, line: int | None, said: str, hint: str
) -> None:
    assert old in FOUR
    assert hint in mistake(tmp_path, FOUR.replace(old, new, 1), line, said)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the lab is empty"),
        ("pool = 1", 1, "'pool' is 1, and should be a table"),
        ("[vm]\nweb = 1", 2, "'web' below [vm] should be a table"),
        ("[vm.a]", 1, "has nothing to start from"),
        ("[vm.a]\nkernel = 'k'\npool = 'default'", 3, "says where its system disk lies"),
        ('name = "a b"\n[vm.a]\nimage = "t"', 1, "the lab's name 'a b' should be"),
        ("name = 1", 1, "'name' is 1, and should be a text"),
        ("[disk.a]\nfile = 'x'\npool = 'y'\nsize = '1G'", 1, "has 'pool' and 'file'"),
        ("[disk.a]\nfile = 'x'\ncount = 2", 3, "a file is one disk, and can't be 2"),
        ("[disk.a]\nsplit = 'x'", 1, "needs a 'count' from 2 on"),
        ("[disk.a]\nsplit = 'x'\ncount = 2", 2, "there is no disk 'x'"),
        ("[disk.a]\nsplit = 'b-1'\ncount = 2\n[disk.b]\nsplit = 'a-1'\ncount = 2", 2,
         "a-1 of b-1 of a-1"),
        ("[disk.a]\nsplit = 'a-1'\ncount = 2", 2, "a disk can't be a part of itself"),
        ("[disk.w]\nsize = '1G'\n[disk.a]\nsplit = 'w'\ncount = 2\n[disk.b]\nsplit = 'w'\ncount=2",
         7, "the disk 'w' is split twice: line 4 does so already"),
        ("[disk.w]\nsize = '1G'\n[disk.a]\nsplit = 'w'\ncount = 2\nsize = '600M'", 6,
         "2 parts of 600 MiB are more than the disk 'w' has: 1 GiB"),
        ("[disk.w]\nsize = '1G'\n[disk.a]\nsplit = 'w'\ncount = 2\n[vm.v]\ndisks = ['w']", 7,
         "'w' is split, so that only its parts"),
        ("[pool.a]\nfile = 'x'\n[disk.b]\nfile = './x'", 4, "is used twice: line 2 has it already"),
        ("[pool.a]\nfile = 'x'\n[pool.b]\nfile = 'y'\n[disk.d]\nsize = '1G'", 5,
         "the lab has several pools, so name one: a, b"),
        (f"[disk.{'d' * 62}]\nsize = '1G'", 1, "name has 1 to 63 bytes"),
        (f"[disk.{'d' * 21}]\nsize = '1G'\n[vm.v]\ndisks = ['{'d' * 21}']", 4,
         "[vm.v]: 'ddd"),
        ("[vm.v]\nimage = 't'\ndisks = [{ disk = 'd', name = 'system' }]\n[disk.d]\nsize = '1G'", 3,
         "two disks of one name"),
        ("[vm.v]\nimage = 't'\nfirmware = 'uefi'\nmemory = '64M'", 4, "UEFI needs 384 MiB"),
    ],
)  # fmt: skip
def test_other_mistakes(tmp_path: Path, text: str, line: int, said: str) -> None:
    mistake(tmp_path, text, line, said)


def test_a_place_that_gives_no_name_is_told_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "my_lab of long names"
    folder.mkdir()
    with pytest.raises(LabMistake, match="'my_lab of long names', which the file's place") as told:
        read(folder, '[vm.a]\nimage = "t"', "lab.toml")
    assert told.value.hint == 'name = "my-lab-of-long-names"'


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="can't read the lab's file") as told:
        read_lab(tmp_path / "none.toml")
    assert told.value.hint is not None
    (tmp_path / "a.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_lab(tmp_path / "a.toml")
    with (tmp_path / "b.toml").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(UsageError, match="too long"):
        read_lab(tmp_path / "b.toml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_each_example_can_be_read(path: Path) -> None:
    assert read_lab(path).vms


def test_the_manuals_file_can_be_read(tmp_path: Path) -> None:
    manual = (EXAMPLES.parent / "docs" / "labs.md").read_text(encoding="utf-8")
    text = manual.partition("## The file\n\n```toml\n")[2].partition("```")[0]
    assert len(read(tmp_path, text).vms) == 4
