"""SET-UP: what this host has, lacks and forbids: `drivebay doctor`, one module a subject."""
