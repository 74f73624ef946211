"""Answers that need not be asked for again, in memory and on disk."""
