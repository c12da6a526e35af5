"""Skeletons that networks of several papers share: four stages, patches of one size, patches with a class token."""
