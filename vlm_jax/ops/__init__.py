"""Floor 1: array functions that own nothing."""
