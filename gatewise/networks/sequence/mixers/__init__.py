"""Sequence mixers that are compared with each other: one file each, with one contract."""
