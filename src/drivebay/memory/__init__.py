"""VOCABULARY: whose bytes these are; barriers, mapped guest memory."""
