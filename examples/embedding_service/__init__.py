"""An asynchronous embedding service that does not lose a document; see `README.md` beside this."""
