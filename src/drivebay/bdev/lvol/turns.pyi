class Turns:
    """One reactor's, for all stores."""

    def close(self) -> None: ...
