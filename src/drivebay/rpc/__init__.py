"""SET-UP: JSON-RPC, its methods, saved configuration, server and client."""
