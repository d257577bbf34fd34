"""Floor 5: the vision-language model."""
