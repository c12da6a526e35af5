"""What a network costs: operations, bytes and memory, by operator, module and stage."""
