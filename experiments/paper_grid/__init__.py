"""What the paper's grid would cost on a named slice."""
