"""What loading a published checkpoint costs in memory and time."""
