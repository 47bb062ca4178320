"""Fuzzers: sessions of vhost-user messages, and rings in shared memory. See docs/testing.md."""
