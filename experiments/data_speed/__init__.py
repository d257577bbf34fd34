"""How fast training data is read and packed."""
