"""Floor 1: stateless array functions."""
