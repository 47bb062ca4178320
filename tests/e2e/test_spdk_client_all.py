"""SPDK's own client, unmodified, calls every method that we have, by its command line.

`spdk-rpc` reads commands from its standard input and ends with 1 at the first that fails. A
method that no line calls fails the test.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.process import TargetProcess

pytest.importorskip("spdk.spdk_rpc")

SPDK_RPC = Path(sysconfig.get_path("scripts")) / "spdk-rpc"
MIB = 1 << 20
UUID = "0a0a0a0a-0000-4000-8000-000000000001"

STARTUP = """
rpc_get_methods
spdk_get_version
bdev_set_options -p 65535 -c 256
iobuf_set_options --small-pool-count 8192 --large-pool-count 1024
accel_set_options --task-count 2048
sock_set_default_impl -i posix
sock_get_default_impl
sock_impl_set_options -i posix --recv-buf-size 4194304
sock_impl_get_options -i posix
framework_set_scheduler static
framework_start_init
"""

BDEVS = f"""
framework_wait_init
fsdev_set_opts 65535 256
fsdev_get_opts
bdev_nvme_set_options --timeout-us 1000000
bdev_nvme_set_hotplug --no-hotplug
bdev_raid_set_options -w 512
bdev_malloc_create -b Malloc0 -u {UUID} 64 512
bdev_malloc_create -b Malloc1 64 4096
bdev_null_create Null0 128 512
bdev_null_resize Null0 256
bdev_aio_create FOLDER/aio.img Aio0 512
bdev_aio_rescan Aio0
bdev_uring_create FOLDER/uring.img Uring0 512
bdev_uring_rescan Uring0
bdev_split_create Malloc0 4
bdev_passthru_create -b Malloc0p0 -p Pass0
bdev_delay_create -b Malloc0p1 -d Delay0 -r 10 -t 20 -w 10 -n 20
bdev_delay_update_latency Delay0 avg_read 5
bdev_error_create Malloc0p2
bdev_error_inject_error EE_Malloc0p2 read failure -n 1
bdev_error_resume_pending EE_Malloc0p2
accel_crypto_key_create -c AES_XTS -n key0 -k 00112233445566778899aabbccddeeff \
 -e ffeeddccbbaa99887766554433221100
accel_crypto_keys_get
bdev_crypto_create Malloc0p3 Crypto0 -n key0
bdev_wait_for_examine
bdev_get_bdevs -b Crypto0 -t 1000
"""

LVOLS = """
bdev_lvol_create_lvstore Malloc1 lvs0 -c 1048576
bdev_lvol_get_lvstores -l lvs0
bdev_lvol_create -l lvs0 thick 8
bdev_lvol_create -l lvs0 -t thin 16
bdev_lvol_snapshot lvs0/thin snap
bdev_lvol_clone lvs0/snap clone
bdev_lvol_resize lvs0/thick 16
bdev_lvol_rename lvs0/thick thick2
bdev_lvol_set_read_only lvs0/thick2
bdev_lvol_get_lvols -l lvs0
bdev_lvol_decouple_parent lvs0/thin
bdev_lvol_set_parent lvs0/thin lvs0/snap
bdev_lvol_inflate lvs0/thin
bdev_lvol_grow_lvstore -l lvs0
bdev_lvol_clone_bdev Null0 lvs0 ext
bdev_lvol_set_parent_bdev lvs0/clone Null0
bdev_lvol_start_shallow_copy lvs0/snap Uring0
bdev_lvol_check_shallow_copy 1
bdev_lvol_rename_lvstore lvs0 lvs1
bdev_lvol_delete lvs1/clone
bdev_lvol_delete_lvstore -l lvs1
"""

RAIDS = """
bdev_malloc_create -b Ra 16 512
bdev_malloc_create -b Rb 16 512
bdev_raid_create -n Raid1 -r raid1 -b "Ra Rb"
bdev_raid_get_bdevs all
bdev_raid_remove_base_bdev Rb
bdev_raid_add_base_bdev Raid1 Rb
bdev_raid_delete Raid1
"""

STATISTICS = """
bdev_set_qos_limit Null0 --rw-ios-per-sec 20000
bdev_set_qd_sampling_period Null0 1000
bdev_enable_histogram --histogram Null0
bdev_get_histogram Null0
bdev_get_histogram_borders Null0 --borders 10,100
"""

REST = """
bdev_get_iostat --names Null0
bdev_reset_iostat -b Null0
vhost_create_blk_controller vhost.0 Null0
vhost_create_blk_controller vhost.1 Crypto0 --cpumask 0x1 -r
vhost_controller_set_coalescing vhost.1 20 60000
vhost_get_controllers -n vhost.1
virtio_blk_get_transports
framework_get_reactors
framework_get_scheduler
framework_get_governor
framework_get_subsystems
framework_get_config bdev
iobuf_get_stats
thread_get_stats
thread_get_pollers
thread_get_io_channels
thread_set_cpumask -i 2 -m 0x1
notify_get_types
notify_get_notifications -i 0 -n 10
log_get_flags
log_set_flag vhost
log_clear_flag vhost
log_set_level NOTICE
log_get_level
log_set_print_level NOTICE
log_get_print_level
log_enable_timestamps --timestamps
vhost_delete_controller vhost.1
bdev_crypto_delete Crypto0
accel_crypto_key_destroy -n key0
bdev_error_delete EE_Malloc0p2
bdev_delay_delete Delay0
bdev_passthru_delete Pass0
bdev_split_delete Malloc0
bdev_uring_delete Uring0
bdev_aio_delete Aio0
bdev_null_delete Null0
bdev_malloc_delete Malloc1
spdk_kill_instance SIGTERM
"""

# What answers with an error where all is as it should be, and with which.
REFUSED = {
    "virtio_blk_create_transport vhost_user_blk": "File exists",
    "bdev_examine -b Malloc0": "Invalid argument",
}
# Methods of parts that may not be here yet: called once one of each is.
OPTIONAL = {
    "bdev_lvol_create": LVOLS,
    "bdev_raid_create": RAIDS,
    "bdev_set_qos_limit": STATISTICS,
}


@pytest.fixture
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        folder = Path(name)
        for image in ("aio.img", "uring.img"):
            with (folder / image).open("wb") as file:
                file.truncate(64 * MIB)
        process = TargetProcess(folder, "--wait-for-rpc")
        yield process
        process.kill()


def spdk(target: TargetProcess, *words: str, script: str | None = None) -> tuple[int, str]:
    """Run spdk-rpc; its exit code, and what it printed."""
    command = [sys.executable, str(SPDK_RPC), "-s", str(target.rpc_path), *words]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def commands(target: TargetProcess) -> list[str]:
    """All that are to be called, in order."""
    methods = target.rpc("rpc_get_methods")
    optional = [block for method, block in OPTIONAL.items() if method in methods]
    script = "".join((STARTUP, BDEVS, *optional, REST)).replace("FOLDER", str(target.folder))
    return [line for line in script.splitlines() if line]


def test_every_method_by_the_clients_command_line(target: TargetProcess) -> None:
    lines = commands(target)
    called = {line.split()[0] for line in (*lines, *REFUSED)}
    ours = {name for name in target.rpc("rpc_get_methods") if not name.startswith("drivebay_")}
    assert sorted(ours - called) == []
    end = lines.pop()
    code, printed = spdk(target, script="\n".join(lines))
    assert code == 0, printed[-2000:]
    for line, message in REFUSED.items():
        code, printed = spdk(target, *line.split())
        assert code == 1
        assert message in printed
    code, printed = spdk(target, *end.split())
    assert code == 0, printed
    assert target.process.wait(30) == 0
