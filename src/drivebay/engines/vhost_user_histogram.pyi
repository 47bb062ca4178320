class Histogram:
    """A histogram of whole numbers that is right to 1.6 %; its maximum and mean are exact."""

    def record(self, value: int) -> None: ...
    def add(self, other: Histogram) -> None:
        """Add what another one holds."""

    @property
    def count(self) -> int: ...
    @property
    def max(self) -> int: ...
    @property
    def mean(self) -> float: ...
    def percentile(self, percent: float) -> int:
        """The value below or at which ``percent`` of all lie; 0 when there are none."""
