"""Floor 4: where a `ConfigDict` ends. Config files import `arguments`; grids import `sweep`; doors call `resolve`."""
