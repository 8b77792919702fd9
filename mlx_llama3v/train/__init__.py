"""Training: one loop, two stages, on the stored embeddings alone."""
