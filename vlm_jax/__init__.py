"""Inference-optimal vision-language models in JAX: train a grid, fit a law, plan from it."""

__version__ = "0.1.0"
