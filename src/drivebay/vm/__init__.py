"""SET-UP: guests in QEMU; they reach a running target through rpc.client only."""
