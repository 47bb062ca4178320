"""Whether a file's device can be polled. Context: worker threads."""
