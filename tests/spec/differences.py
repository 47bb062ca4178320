"""Where our answers differ from SPDK's recorded ones, and why that is right.

Each rule names places (see recording.Rule) and, where that is possible, both values. A rule
that covers nothing fails the test, so none outlives its reason. Context: tests.
"""

from __future__ import annotations

from typing import Final

from tests.spec.recording import MISSING, NUMBER, Rule

_RUN: Final = "differs between any two runs"

MEASURED: Final = (
    *(
        Rule(where, _RUN, NUMBER, NUMBER)
        for where in (
            "*:result/tick_rate",
            "bdev_get_iostat:result/ticks",
            "bdev_get_iostat:result/*/*_latency_ticks",
            "thread_get_stats:result/threads/*/busy",
            "thread_get_stats:result/threads/*/idle",
            "framework_get_reactors:result/pid",
            "framework_get_reactors:result/reactors/0/tid",
            "framework_get_reactors:result/reactors/0/busy",
            "framework_get_reactors:result/reactors/0/idle",
            "framework_get_reactors:result/reactors/0/usr",
            "framework_get_reactors:result/reactors/0/sys",
            "framework_get_reactors:result/reactors/0/lw_threads/*/elapsed",
        )
    ),
    *(
        Rule(where, "a number that counts what was made before", NUMBER, NUMBER)
        for where in (
            "thread_get_*:result/threads/*/id",
            "framework_get_reactors:result/reactors/0/lw_threads/*/id",
        )
    ),
    Rule(
        "bdev_get_iostat:result/*/num_*_ops",
        "SPDK read each new disk more often, and bdevperf's load is not ours",
        NUMBER,
        NUMBER,
    ),
    Rule("bdev_get_iostat:result/*/bytes_*", "the same", NUMBER, NUMBER),
    *(
        Rule(where, "bdevperf connects twice, and keeps requests in flight", NUMBER, NUMBER, (606,))
        for where in ("*/vhost.0s0/id", "*/vhost.0s0/inflight_task_cnt")
    ),
    *(
        Rule(where, "a queue of ours is a poller, and at rest without bdevperf's load")
        for where in (
            "thread_get_stats:result/threads/vhost.0/*_pollers_count",
            "thread_get_pollers:result/threads/vhost.0/*_pollers/*",
        )
    ),
)

OUR_OWN: Final = (
    Rule("*:result/version", "our own name", ours="Drivebay v0.1.0 (speaks SPDK v26.09)"),
    Rule("*:result/fields/suffix", "our own version", "-pre", "-drivebay-0.1.0"),
    Rule("*:result/fields/commit", "our own version", "3230130e6a", MISSING),
    Rule("rpc_get_methods:result/drivebay_*", "methods of our own", MISSING),
    Rule("rpc_get_methods:result/(order)", "each lists methods in the order of its own files"),
    Rule("rpc_get_methods:result/bdev_crypto_*", "SPDK was built without it", MISSING),
    Rule(
        "framework_get_scheduler:result/scheduler_name",
        "known before initialisation too",
        MISSING,
        "static",
        (10,),
    ),
    Rule("log_get_flags:result/*", "SPDK's parts, not ours", False, MISSING),
    Rule("log_get_flags:result/*", "our parts, not SPDK's", MISSING, False),
    Rule("*:result/stdout/version", "our own name"),
    Rule("*:result/stdout/fields/suffix", "our own version"),
    Rule("*:result/stdout/fields/commit", "our own version", ours=MISSING),
    Rule("CLI spdk-rpc -v spdk_get_version:result/stderr", "the same, in the client's log"),
    Rule(
        "CLI spdk-rpc no_such_command:result/stderr",
        "the client's own list of commands, as its release has it",
    ),
    *(
        Rule(f"CLI spdk-rpc {words}:result/stdout", "the client prints error.data too")
        for words in (
            "bdev_get_bdevs -b nosuch",
            "vhost_create_blk_controller vc nosuch",
        )
    ),
    Rule(
        "thread_get_io_channels:result/threads/*/io_channels/*",
        "SPDK's parts have channels too; ours are those of bdevs",
        ours=MISSING,
    ),
    Rule(
        "thread_get_io_channels:result/threads/app_thread/io_channels/*",
        "channels that stand below others are shown with the app thread",
        MISSING,
    ),
    Rule("thread_get_io_channels:result/*/bdev_M0/ref", "no vhost-scsi uses it", 3, 2),
    Rule(
        "bdev_get_iostat:result/channels/*",
        "channels by the number of their thread",
        only=(475, 604),
    ),
    Rule("notify_get_types:result/fsdev_*", "no file systems are shared", ours=MISSING),
    Rule(
        "framework_get_reactors:result/reactors/0/in_interrupt",
        "our reactors sleep when there is nothing to do",
        False,
        True,
    ),
    Rule(
        "thread_get_*:result/threads/app_thread/*pollers*",
        "control is an asyncio loop: nothing is polled",
    ),
    Rule("iobuf_get_stats:result/*", "no part takes buffers from a pool", ours=MISSING),
    Rule(
        "framework_set_scheduler:answer",
        "a queue stays on its reactor: there is no dynamic scheduler",
        True,
        only=(48,),
    ),
    Rule("START vhost -c:result/rc", "a start that fails ends with 1, as everywhere", 234, 1),
)

_TYPES: Final = "*/supported_io_types"
_SHOWN: Final = "bdev_get_bdevs:result/*/driver_specific"

SHOWN: Final = (
    *(
        Rule(f"{_TYPES}/{name}", "no front end here can ask for it", True, False)
        for name in (
            "reset",
            "zcopy",
            "compare",
            "abort",
            "copy",
            "get_zone_info",
            "zone_management",
            "seek_hole",
            "seek_data",
        )
    ),
    Rule("bdev_get_bdevs:result/*/memory_domains", "there is but one memory", ours=MISSING),
    *(
        Rule(
            f"bdev_get_bdevs:result/cf478703-*/supported_io_types/{name}",
            "that volume was set read-only",
            True,
            False,
        )
        for name in ("write", "unmap", "write_zeroes")
    ),
    Rule(f"{_TYPES}/unmap", "space comes back: files get holes", False, True),
    Rule(f"{_TYPES}/flush", "what a file's cache holds can be made stable", False, True),
    *(
        Rule(f"bdev_get_bdevs:result/A1/supported_io_types/{name}", "it is read-only", True, False)
        for name in ("write", "flush", "write_zeroes")
    ),
    *(
        Rule(f"{_SHOWN}/{name}", "how a file is opened, for uring as for aio", MISSING)
        for name in (
            "*/direct",
            "*/polled",
            "uring/block_size_override",
            "uring/readonly",
            "uring/fallocate",
        )
    ),
    Rule(f"{_SHOWN}/aio/fallocate", "holes are made unless that is turned off", False, True),
    Rule(f"{_SHOWN}/aio/nowait", "io_uring never blocks a reactor", False, MISSING),
    Rule(
        "bdev_get_bdevs:result/U0/driver_specific/uring/filename",
        "a file that another bdev has open is not opened again: U0 stands on another one",
    ),
    Rule(
        "bdev_get_bdevs:result/*",
        "this was asked of the process with SPDK's initiator, which is a later part",
        only=(469,),
    ),
)

_NULL: Final = "*/bdev_null_create */params"
_MALLOC: Final = "*/bdev_malloc_create */params"
_AIO: Final = "*/bdev_aio_create */params"

SAVED: Final = (
    *(
        Rule(f"{where}/{name}", "a default, which is not written", value, MISSING)
        for where in (_NULL, _MALLOC)
        for name, value in (
            ("physical_block_size", 512),
            ("physical_block_size", 4096),
            ("md_size", 0),
            ("dif_type", 0),
            ("dif_is_head_of_md", False),
            ("dif_pi_format", 0),
        )
    ),
    Rule(f"{_MALLOC}/optimal_io_boundary", "a default, which is not written", 0, MISSING),
    Rule(f"{_MALLOC}/numa_id", "a default, which is not written", -1, MISSING),
    *(
        Rule(f"{_NULL}/{name}", "a default, which is not written", 0, MISSING)
        for name in (
            "preferred_write_granularity",
            "preferred_write_alignment",
            "optimal_write_size",
            "preferred_unmap_granularity",
            "preferred_unmap_alignment",
        )
    ),
    Rule(f"{_AIO}/fallocate", "holes are made unless that is turned off", False, True),
    Rule(f"{_AIO}/nowait", "io_uring never blocks a reactor", False, MISSING),
    Rule(
        "*/bdev_uring_create U0/params/filename",
        "a file that another bdev has open is not opened again: U0 stands on another one",
    ),
    *(
        Rule(f"{place}/{latency}", "SPDK loses a microsecond at each save", NUMBER, NUMBER)
        for place in ("*/bdev_delay_create D0/params", "*/D0/driver_specific/delay")
        for latency in ("*_read_latency", "*_write_latency")
    ),
    Rule(
        "*/bdev_delay_create D1",
        "what waits for its base is wanted after a restart too",
        MISSING,
    ),
    *(
        Rule(where, "here what stands on others comes after them", only=(453, 510, 554, 560))
        for where in ("*config/(order)", "framework_get_config:result/(order)", "bdev_*:*/(order)")
    ),
    Rule("*/params/packed_ring", "SPDK loses it at a restart", MISSING, True),
    Rule(
        "*/bdev_passthru_create PT1",
        "what waits for its base is wanted after a restart too",
        MISSING,
    ),
    Rule("CLI spdk-rpc save_config:result/stdout", "SPDK's is cut off here", only=(459,)),
)

# design.md: right where SPDK hangs, hides or loses something.
RIGHT: Final = (
    Rule("bdev_set_qos_limit:answer", "a second limit works", ours=True, only=(349, 626)),
    Rule(
        "bdev_get_bdevs:result/M0/assigned_rate_limits/rw_ios_per_sec",
        "it was cleared by call 349",
        20000,
        0,
    ),
    *(
        Rule(
            f"bdev_get_histogram:result/{where}", "up to 120 s in our ticks, where SPDK's overflows"
        )
        for where in ("histogram", "max_range", "tsc_rate")
    ),
    *(
        Rule(f"bdev_get_iostat:result/bdevs/M0/{where}", "bdevperf's load is not ours", NUMBER, 0)
        for where in ("queue_depth", "io_time", "weighted_io_time")
    ),
    Rule("bdev_malloc_create:answer", "no bdev has metadata", "MMD", only=(170,)),
    Rule("bdev_uring_create:answer", "another bdev has that file open", "U0", only=(190,)),
    Rule("bdev_raid_create:answer", "raid5f is a later part", True, only=(230,)),
    *(
        Rule(where, "raid5f is a later part", ours=MISSING)
        for where in (
            "bdev_raid_get_bdevs:result/R5",
            "bdev_get_bdevs:result/R5",
            "framework_get_config:result/bdev_raid_create R5",
        )
    ),
    *(
        Rule(
            f"bdev_get_bdevs:result/{base}/claim{what}", "raid5f, which claims it, is a later part"
        )
        for base in ("Rg", "Rh", "MSp3")
        for what in ("ed", "_type")
    ),
    Rule(
        "framework_get_config:result/bdev_set_qos_limit M0",
        "it was cleared by call 349",
        ours=MISSING,
    ),
    Rule(
        "vhost_create_blk_controller:answer",
        "a socket path that is too long is refused",
        True,
        only=(396,),
    ),
    Rule("*xxxxx*", "that controller was refused", ours=MISSING),
    Rule(
        "CLI spdk-rpc load_config:result/stdout",
        "what exists already is refused; our file begins with another bdev",
        only=(564,),
    ),
    Rule(
        "CLI spdk-rpc load_config:result/*",
        "SPDK saved a controller with a name that is too long and can't load it",
        only=(508,),
    ),
    Rule(
        "vhost_get_controllers:result/vhost.ro/backend_specific/block/readonly",
        "a controller on a bdev that is read-only is read-only",
        False,
        True,
    ),
    Rule(
        "vhost_delete_controller:answer",
        "a controller with a session is refused at once, not waited for",
        True,
        only=(570,),
    ),
    Rule("PROCESS:exit_status", "SPDK crashed at the end", -6, 0, (507,)),
    Rule("PROCESS:files/*", "what SPDK left when it crashed", ours=MISSING, only=(507,)),
    Rule(
        "RAW:lines",
        "what is not JSON is answered",
        [],
        [{"error": -32700, "id": None}],
    ),
    Rule(
        "RAW:lines",
        "the request before is answered, and so is what is not JSON",
        [],
        [
            {"jsonrpc": "2.0", "id": 1, "result": "NOTICE"},
            {"error": -32700, "id": None},
        ],
        (143,),
    ),
)

# Methods that were called, and others that are only listed.
LATER_CALLED: Final = (
    "bdev_virtio_*",
    "bdev_zone_block_*",
    "vhost_*scsi*",
    "scsi_*",
    "keyring_*",
    "trace_*",
    "accel_*",
    "env_dpdk_*",
    "framework_monitor_context_switch",
    "framework_*_cpumask_locks",
)
LATER_LISTED: Final = (
    "bdev_ftl_*",
    "bdev_opal_*",
    "bdev_nvme_*",
    "nbd_*",
    "vfu_*",
    "vmd_*",
    "fsdev_aio_*",
    "ioat_*",
    "ae4dma_*",
    "framework_get_pci_devices",
    "scheduler_set_options",
)

_LATER: Final = "a part of SPDK that this version does not have"

LATER: Final = (
    *(Rule(f"{name}:method", _LATER, ours="Method not found") for name in LATER_CALLED),
    *(
        Rule(f"rpc_get_methods:result/{name}", _LATER, ours=MISSING)
        for name in (*LATER_CALLED, *LATER_LISTED)
    ),
    *(
        Rule(f"framework_get_subsystems:result/{name}", _LATER, ours=MISSING)
        for name in ("keyring", "vmd", "nbd", "scsi", "vhost_scsi", "vfio_user_target")
    ),
    *(
        Rule(f"framework_get_subsystems:result/bdev/depends_on/{name}", _LATER, ours=MISSING)
        for name in ("keyring", "vmd")
    ),
    *(
        Rule(f"CLI spdk-rpc save_config:result/stdout/subsystems/{name}", _LATER, ours=MISSING)
        for name in ("keyring", "vmd", "nbd", "scsi", "vhost_scsi", "vfio_user_target")
    ),
    *(
        Rule(where, "a controller of vhost-scsi", ours=MISSING)
        for where in (
            "vhost_get_controllers:result/s*.?",
            "thread_*:result/threads/scsi.?",
            "framework_get_reactors:result/reactors/0/lw_threads/scsi.?",
        )
    ),
    Rule("vhost_*:answer", "a controller of vhost-scsi", only=(423, 429, 479, 495, 496)),
    Rule("vhost_delete_controller:error/*", "a controller of vhost-scsi", only=(571,)),
    Rule(
        "framework_get_config:answer",
        "the configuration of a part that this version does not have",
        only=(30, 31, 40, 42, 449, 450, 456, 457, 458),
    ),
    *(
        Rule(
            where,
            "the NVMe driver's own settings, which are saved when somebody set them",
            ours=MISSING,
        )
        for where in ("framework_get_config:result/bdev_nvme_*", "CLI *config/bdev_nvme_*")
    ),
)

RULES: Final = (*MEASURED, *OUR_OWN, *SHOWN, *SAVED, *RIGHT, *LATER)
