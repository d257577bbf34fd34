"""Floor 5: what outlives a process: checkpoints, features, metrics, result rows."""
