"""Floor 6: evaluation of trained models, and result rows."""
