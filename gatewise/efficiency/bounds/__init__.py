"""Speed limits of a network: the limits of a machine, and the kernels that slow a network down."""
