"""Runs the cells of a grid on several backends; the command is `experiments.launch`."""
