"""What happens to a run when things go wrong, tried for real: `python -m experiments.faults.run`."""
