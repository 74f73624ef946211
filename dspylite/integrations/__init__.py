"""Doors to other people's frameworks; each file needs the extra of its name and loads alone."""
