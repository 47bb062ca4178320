"""Fast disks for virtual machines: a vhost-user storage target."""
