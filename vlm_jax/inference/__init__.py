"""Answering: prefill, decode_step and sample; public models and runs, loaded; `forward` and `generate`."""
