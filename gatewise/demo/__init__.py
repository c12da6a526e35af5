"""Demo: train, measure and export a network, and report it on one page."""
