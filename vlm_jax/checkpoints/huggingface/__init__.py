"""Hugging Face folders: configurations and tensors, read and written."""
