"""Sources of conversations on disk: LLaVA's json, parquet, jsonl, TFDS, and classes of one's own."""
