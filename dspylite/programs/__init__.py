"""Programs: modules made of calls to models."""
