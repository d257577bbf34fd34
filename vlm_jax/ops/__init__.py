"""Level 1: stateless array functions."""
