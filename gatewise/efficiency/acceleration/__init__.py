"""Ways to run a network faster with the same output: folding, rewriting, compilers and runtimes, and export."""
