"""A small corpus, and vectors that anybody can compute: what DSPy's results were taken with."""

from __future__ import annotations

CORPUS = [
    "The Nile flows north through Egypt.",
    "Mount Everest is the highest mountain.",
    "Cats sleep for most of the day.",
    "The Rhine passes Basel and Cologne.",
    "A year on Mercury takes 88 days.",
    "Owls hunt at night.",
    "Stars are suns that are far away.",
]


def letter_counts(texts: list[str]) -> list[list[float]]:
    """Count some letters of each text."""
    return [[text.lower().count(letter) + 0.125 for letter in "adehilmnorstuy"] for text in texts]
