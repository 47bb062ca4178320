"""What is looked at with a browser."""
