"""Inference: loading of models, prefill, decode_step and sample; `forward` and `generate`."""
