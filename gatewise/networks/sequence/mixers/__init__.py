"""Sequence mixers that are compared with each other: one file each, all behind one contract."""
