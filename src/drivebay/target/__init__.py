"""SET-UP: the object graph of a target, its start and stop order, its options."""
