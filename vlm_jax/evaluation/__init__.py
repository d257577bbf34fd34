"""Floor 6: what a trained model is worth, as typed rows."""
