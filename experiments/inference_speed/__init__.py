"""Prefill and decode speed of loaded models, compared with other libraries."""
