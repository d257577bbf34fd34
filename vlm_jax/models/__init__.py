"""Floor 5: the vision-language model, as linen modules and the pure functions that join them."""
