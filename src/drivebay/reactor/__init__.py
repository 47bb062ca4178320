"""THE LOOP: one thread per core, its mailbox, timers and clock."""
