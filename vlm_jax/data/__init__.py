"""Level 5: sources of examples, conversations, tokenizers, images, packing, batches, stored features."""
