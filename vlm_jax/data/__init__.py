"""Floor 5: the visual question answering suite made from real handwriting, from pixels to `core.structs.Batch`."""
