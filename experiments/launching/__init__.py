"""How a grid is run: its cells, who runs which, where they run, and what is shown meanwhile. The door is
`experiments.launch`."""
