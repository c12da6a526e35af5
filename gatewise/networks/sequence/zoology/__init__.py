"""Zoology: one language model with any sequence mixer, to compare mixers on recall."""

from gatewise.networks.sequence.zoology.keys import Published, reference_layout
from gatewise.networks.sequence.zoology.network import MIXERS, ZoologyConfig, ZoologyNet

__all__ = ["MIXERS", "Published", "ZoologyConfig", "ZoologyNet", "reference_layout"]
