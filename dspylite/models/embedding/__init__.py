"""The parts of embedding beside `Embedder`: counting tokens, cutting texts that are too long."""
