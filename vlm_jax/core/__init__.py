"""Level 0: axis names, specs, arrays' containers and errors. Imports nothing of the project and touches no device."""
