"""Level 2: visual-token compressors, as rows of pure functions (`compress.catalog`)."""
