"""SET-UP: pools and disks as people speak of them, of a running target and over its RPC."""
