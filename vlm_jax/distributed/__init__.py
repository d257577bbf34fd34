"""Sharding over devices, and runs of several processes."""
