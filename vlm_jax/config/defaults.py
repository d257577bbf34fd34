"""Settings that the recipes of `configs/` share."""

from ml_collections import ConfigDict


def add_logs_and_checkpoints(
    config: ConfigDict, log_every_steps: int, save_every_steps: int = 0, keep_checkpoints: int = 1
) -> None:
    """How often a run logs and saves; nothing that its result depends on but the policy for bad steps, which stops."""
    config.log_every_steps = log_every_steps
    config.evaluate_every_steps = 0
    config.save_every_steps = save_every_steps
    config.keep_checkpoints = keep_checkpoints
    config.keep_every_steps = 0
    config.bad_step = dict(policy="stop", spike_factor=0.0, skip_limit=10)
