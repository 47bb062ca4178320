"""SET-UP: the vhost-user protocol, its sessions and controllers."""
