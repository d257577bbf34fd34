"""Sizes and costs of the built-in compressors, apart from their functions of arrays: nothing here imports jax."""
