"""Cost of a network: operations, bytes and memory, by operator, module and stage."""
