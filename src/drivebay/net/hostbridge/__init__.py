"""The host's uplink moved into a bridge, and back again unless somebody confirms it.

Context: root's short-lived commands, and one process of its own, the guardian.

    plan ──► before.json ──► guardian ──► moves ──► confirm ──► configuration files
                                │
                                └─ no confirm in time: everything as before.json says

A power cycle before `confirm` restores too, because until then nothing is written that the
host reads when it starts.
"""
