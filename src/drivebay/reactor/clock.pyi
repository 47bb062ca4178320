def tick_rate() -> int:
    """Ticks a second of busy_ticks, idle_ticks and iostat."""
