"""Level 6: the law half: rows in, a law with its doubts out, and plans from it. No accelerator is touched."""
