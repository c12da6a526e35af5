"""Modules shared by two or more networks."""
