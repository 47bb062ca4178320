from drivebay.bdev.lvol.table import ClusterTable

def draw(table: ClusterTable, page: int, num_clusters: int) -> bytes:
    """The 4,096 bytes of a table's extent page, as if it had ``num_clusters`` clusters."""
