"""Floor 0: the words everything above is written in. Imports nothing of the project, no device is touched."""
