"""Search over a corpus of texts by their vectors."""
