"""Limits are C only: see qos.pxd."""
