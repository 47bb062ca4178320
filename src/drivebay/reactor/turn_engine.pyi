class TurnEngine:
    """One of its kind a reactor; it lives as long as the reactor does."""

    def close(self) -> None:
        """Let go of what it holds: nothing."""
