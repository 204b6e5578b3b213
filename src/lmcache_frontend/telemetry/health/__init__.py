"""Which nodes are up: each is checked again and again, in turns."""
