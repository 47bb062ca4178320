"""THE PATH: virtqueues, requests and the queues that serve them."""
