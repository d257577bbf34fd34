"""Level 10: a run's programs compiled ahead of time by XLA:TPU, without a TPU."""

# Set before JAX is imported: nothing runs on this machine, libtpu does not look for a TPU, and several compilations may
# run at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # unused, but libtpu warns without it
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
