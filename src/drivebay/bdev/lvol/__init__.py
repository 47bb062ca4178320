"""Logical volumes on SPDK's blobstore."""
