"""Floor 9: the real programs of a run, compiled by XLA:TPU for a pod that is not there."""

# To be set before JAX is imported: this machine computes nothing, libtpu is not to look for a TPU, and several
# compilations may go on at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of no consequence, but libtpu warns where it is missing
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
