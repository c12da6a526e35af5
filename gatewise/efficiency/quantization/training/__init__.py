"""Quantization-aware training: the plan of the codes, and the simulation that a network is trained in."""
