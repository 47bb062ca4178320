"""Configuration that a host reads when it starts: the bridge has what the uplink had.

Context: root; `confirm`. A writer reads the host's files and returns what they should be; it
writes nothing. ``root`` is the host's root folder, another one in tests.
"""
