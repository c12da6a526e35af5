"""Sequence networks: tokens in, logits out."""
