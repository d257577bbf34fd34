"""Level 7, the composition root: builds model, mesh, data and features from a `RunSpec`.

network = open_network(spec)            # without data: enough for inference
run = open_run(spec, cache_dir)         # with data and features, cached in cache_dir
"""

from vlm_jax.build.data import data_sets, open_mixture, row_layout, spec_layout
from vlm_jax.build.network import (
    Network,
    TrainStep,
    abstract_state,
    cache_errors,
    default_cache,
    first_params,
    init_params,
    lay_out,
    open_network,
    train_step,
    use_compilation_cache,
)
from vlm_jax.build.published import load_tokenizer, tokenizer_folder
from vlm_jax.build.run import Run, open_run, runs_at_every_v

__all__ = [
    "Network", "Run", "TrainStep", "abstract_state", "cache_errors", "data_sets",
    "default_cache", "first_params", "init_params", "lay_out", "load_tokenizer", "open_mixture", "open_network",
    "open_run", "row_layout", "runs_at_every_v", "spec_layout", "tokenizer_folder", "train_step",
    "use_compilation_cache",
]  # fmt: skip
