"""Level 6: built-in data sets, users of the interface of `vlm_jax.data.examples`."""
