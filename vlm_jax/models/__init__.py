"""Level 5: the vision-language model."""
