"""FOUNDATION: locks, processes, private files and TOML tables, as all tools share them."""
