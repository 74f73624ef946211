"""The words of a signature as plain data, in DSPy's form: instructions, prefixes, descriptions.

Not here: the signature itself (`schema/signature.py`); its names and types are the program's own
and are never taken from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dspylite.errors import SavingError


class Words(NamedTuple):
    """What a file says of one field."""

    prefix: str
    desc: str


def dumped_words(name: str, prefix: str, desc: str) -> dict[str, str]:
    """Return what is saved of a field; DSPy writes `${name}` where there is no description."""
    return {"prefix": prefix, "description": desc or f"${{{name}}}"}


def loaded_words(
    state: Any, signature_name: str, names: Sequence[str]
) -> tuple[str, dict[str, Words]]:
    """Read the instructions, and the words of each field, which are saved in the fields' order.

    Raises:
        SavingError: It is no state of a signature, or of one with more or fewer fields.
    """
    if not isinstance(state, Mapping):
        raise SavingError(f"The state of a signature is a dict, not {state!r:.200}.")
    instructions, saved = state.get("instructions"), state.get("fields")
    if not isinstance(instructions, str) or not isinstance(saved, list):
        raise SavingError(
            "The state of a signature needs `instructions`, a text, and `fields`, a list; it has "
            f"{', '.join(map(str, state)) or 'nothing'}."
        )
    if len(saved) != len(names):
        labels = ", ".join(
            str(each.get("prefix")) if isinstance(each, Mapping) else "?" for each in saved
        )
        raise SavingError(
            f"`{signature_name}` has {len(names)} fields ({', '.join(names)}), and the saved "
            f"signature has {len(saved)} ({labels:.500}); load it into the program that saved it."
        )
    words: dict[str, Words] = {}
    for name, each in zip(names, saved, strict=True):
        found = (
            (each.get("prefix"), each.get("description")) if isinstance(each, Mapping) else (None,)
        )
        prefix, desc = found[0], found[-1]
        if not isinstance(prefix, str) or not isinstance(desc, str):
            raise SavingError(
                f"The saved field for `{signature_name}.{name}` must have a `prefix` and a "
                f"`description`, both texts, not {each!r:.200}."
            )
        words[name] = Words(prefix, "" if desc == f"${{{name}}}" else desc)
    return instructions, words
