"""Fidelity: our networks held against digests of the reference implementations' outputs."""
