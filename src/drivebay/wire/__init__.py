"""VOCABULARY: layouts and numbers of the protocols, no behaviour."""
