"""Level 3: numbers about a model, computed from its spec; no device is touched."""
