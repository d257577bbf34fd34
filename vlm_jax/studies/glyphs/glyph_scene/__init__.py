"""Reasoning: a few objects; questions of two or three steps, about combinations never asked about in training."""
