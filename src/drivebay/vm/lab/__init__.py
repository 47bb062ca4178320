"""A lab: pools, disks, networks and VMs that one file describes, made and changed by `up`."""
