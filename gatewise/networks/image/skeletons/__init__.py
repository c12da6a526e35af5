"""Skeletons shared by several papers: four stages, patches at one resolution, patches with a class token."""
