"""Execution time of a network: interleaved measurements, baselines, comparisons, energy."""
