"""Level 7: evaluation of trained models, and result rows."""
