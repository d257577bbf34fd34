"""Knowledge: the canvas shows which entity is meant; the answer is a fact about it that had to be learned."""
