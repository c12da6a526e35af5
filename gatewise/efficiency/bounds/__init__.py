"""How fast a network could be: the limits of a machine, and what holds a network back."""
