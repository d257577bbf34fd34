"""Compressors compared: speed of a decoder that tokens leave."""
