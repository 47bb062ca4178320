"""THE PATH: how bytes reach the device."""
