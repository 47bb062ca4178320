"""The other side of every interface, written from the specifications and never from our modules."""
