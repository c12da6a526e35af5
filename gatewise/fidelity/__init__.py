"""Fidelity: compare our networks with digests of the reference implementations' outputs."""
