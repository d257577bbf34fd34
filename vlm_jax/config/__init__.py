"""Level 4: `ConfigDict` to `RunSpec`. Config files import `arguments`, grids `sweep`; commands call `resolve`."""
