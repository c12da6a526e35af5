"""How long a network takes: interleaved measurements, baselines, comparisons, energy."""
