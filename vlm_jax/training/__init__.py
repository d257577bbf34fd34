"""Level 6: loss, optimiser, step and loop. Imports no data set and no evaluator."""
