"""Which part of SPDK a method belongs to that this version lacks.

Context: any; no I/O.
"""

from __future__ import annotations

from typing import Final

__all__ = ["lacking_part"]

# Beginnings of SPDK's methods for parts that this version lacks.
_LACKING: Final = {
    "bdev_nvme_": "the NVMe driver",
    "bdev_virtio_": "the virtio initiator",
    "bdev_rbd_": "Ceph RBD",
    "bdev_iscsi_": "the iSCSI initiator",
    "bdev_ftl_": "FTL",
    "bdev_zone_": "the zone module",
    "vhost_create_scsi": "vhost-scsi",
    "vhost_start_scsi": "vhost-scsi",
    "vhost_scsi_": "vhost-scsi",
    "nvmf_": "the NVMe-oF target",
    "iscsi_": "the iSCSI target",
    "nbd_": "NBD",
    "ublk_": "ublk",
    "vfu_": "vfio-user",
    "fsdev_": "sharing file systems",
    "keyring_": "the key ring",
    "scsi_": "vhost-scsi",
    "vmd_": "Intel VMD",
    "trace_": "SPDK's tracing",
    "accel_": "SPDK's accelerator framework",
    "env_dpdk_": "DPDK",
    "ioat_": "SPDK's accelerator framework",
    "ae4dma_": "SPDK's accelerator framework",
    "bdev_opal_": "the NVMe driver",
    "framework_get_pci_devices": "the NVMe driver",
    "framework_monitor_context_switch": "the monitor of context switches",
    "framework_enable_cpumask_locks": "locking cores against other processes",
    "framework_disable_cpumask_locks": "locking cores against other processes",
    "scheduler_set_options": "the dynamic scheduler",
}


def lacking_part(method: str) -> str | None:
    """A sentence about the part of SPDK that a method belongs to and this version lacks."""
    part = next((part for start, part in _LACKING.items() if method.startswith(start)), None)
    return f"{part} is not part of this version" if part else None
