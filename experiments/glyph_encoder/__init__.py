"""The study's encoder: a small ViT that learned to read what lies on every patch, then was frozen."""
