"""GPU kernels in Triton, one file per operator. Imported on first use: nothing else here needs Triton."""
