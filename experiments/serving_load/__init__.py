"""Throughput of the server under concurrent clients."""
