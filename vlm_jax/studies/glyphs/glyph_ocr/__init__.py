"""Transcription: a grid of handwritten digits; the question names a row, a column or all; the answer reads it."""
