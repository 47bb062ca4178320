"""RAID bdevs: striped (raid0), one after the other (concat), mirrored (raid1)."""
