"""Floor 6: a model that answers: prefill, decode_step, sample."""
