"""What works without any model: the reader behind `OfflineLM`, and hashed vectors."""
