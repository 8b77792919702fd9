"""From data files to batches; the pictures themselves come from the embedding store."""
