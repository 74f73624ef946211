"""A predictor as plain data, in the form that DSPy 3 writes and reads.

Not here: programs of several predictors, and files (`programs/saving.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dspylite.adapters.values import load_json, type_adapter
from dspylite.errors import SavingError
from dspylite.models.base import BaseLM
from dspylite.models.states import HasState
from dspylite.schema.plain import plain
from dspylite.schema.records import Example
from dspylite.schema.signature import Field, Signature

logger = logging.getLogger(__name__)

_RECORDS = ("traces", "train", "demos")
_KNOWN = frozenset({*_RECORDS, "signature", "lm"})
_MARKS = ("<<CUSTOM-TYPE-START-IDENTIFIER>>", "<<CUSTOM-TYPE-END-IDENTIFIER>>")
"""Between them stand an image, audio or a file in a state of DSPy, as parts of a message."""
_OURS = {"format": "audio_format"}
"""Names in such parts, and those of our fields, where they differ."""


class Loaded(NamedTuple):
    """What a state says, read and checked."""

    signature: type[Signature]
    lm: BaseLM | None
    demos: list[Any]
    traces: list[Any]
    train: list[Any]


def dump_predictor(
    signature: type[Signature], lm: Any, records: Mapping[str, Sequence[Any]], *, json_mode: bool
) -> dict[str, Any]:
    """Return the state of a predictor.

    Args:
        signature: Its signature.
        lm: Its own LM, if it has one.
        records: Its `traces`, `train` and `demos`.
        json_mode: Whether all is made plain data; otherwise records are returned as they are.

    Raises:
        SavingError: A value is no data.
    """
    if lm is not None and not isinstance(lm, HasState):
        raise SavingError(
            f"The predictor's LM {lm!r} has no `dump_state()`; set `predictor.lm = None` to save "
            "without it."
        )
    state: dict[str, Any] = {
        name: plain(list(records[name]), name) if json_mode else list(records[name])
        for name in _RECORDS
    }
    state["signature"] = signature.dump_state()
    state["lm"] = None if lm is None else lm.dump_state()
    return state


def read_predictor(signature: type[Signature], state: Any, *, trusted: bool) -> Loaded:
    """Read the state of a predictor for one with this signature; nothing is changed.

    Raises:
        SavingError: It is no state of such a predictor.
    """
    if not isinstance(state, Mapping):
        raise SavingError(f"The state of a predictor is a dict, not {state!r:.200}.")
    if "extended_signature" in state:
        raise SavingError(
            "This was saved by DSPy 2.5 or before, which kept `ChainOfThought` in another form; "
            "save it anew with DSPy 3."
        )
    for name in ("signature", "demos"):
        if name not in state:
            raise SavingError(
                f"The state of a predictor needs `{name}`; it has {', '.join(map(str, state))}."
            )
    others = [str(name) for name in state if name not in _KNOWN and state[name]]
    if unknown := sorted(set(others) - {"metadata"}):
        logger.warning("ignored in the saved state of a predictor: %s", ", ".join(unknown))
    made = signature.load_state(state["signature"])
    lm = state.get("lm")
    records = {name: _records(name, state.get(name) or []) for name in _RECORDS}
    records["demos"] = [_demo(made, demo, place) for place, demo in enumerate(records["demos"])]
    return Loaded(
        signature=made,
        lm=None if lm is None else BaseLM.load_state(lm, allow_custom_lm_class=trusted),
        **records,
    )


def _records(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SavingError(f"`{name}` of a saved predictor must be a list, not {value!r:.200}.")
    return list(value)


def _demo(signature: type[Signature], demo: Any, place: int) -> Any:
    """Return a demo whose values have the types of their fields again."""
    if isinstance(demo, Example):  # from `dump_state(json_mode=False)`
        return demo.copy()
    if not isinstance(demo, Mapping):
        raise SavingError(f"`demos[{place}]` of a saved predictor is no dict: {demo!r:.200}.")
    fields = signature.fields
    return {
        name: _typed(fields[name], value) if name in fields else value
        for name, value in demo.items()
    }


def _typed(field: Field, value: Any) -> Any:
    """Make of plain data what a field's type makes of it, if that would be saved the same.

    Prompts then show it as before it was saved: a date is no text, and a model knows its aliases.
    """
    if field.annotation is str or value is None:
        return value
    data = _without_marks(value)
    if data is not value:
        return _of_parts(field, value, data)
    try:
        made = type_adapter(field.annotation, ()).validate_python(value)
        return made if json.dumps(plain(made, field.name)) == json.dumps(value) else value
    except Exception:  # noqa: BLE001  # whatever a validator raises: then it stays plain data
        return value


def _of_parts(field: Field, value: Any, data: Any) -> Any:
    """Make a field's type of what DSPy saved as parts of a message."""
    try:
        return type_adapter(field.annotation, ()).validate_python(data)
    except Exception:  # noqa: BLE001  # whatever a validator raises: then it stays as it is
        logger.warning(
            "in the saved state of a predictor, the demos' `%s` is no %s but parts of a message; "
            "it stays as it is, so set it anew",
            field.name,
            field.type_name,
        )
        return value


def _without_marks(value: Any) -> Any:
    """Return a saved value with the fields of media for their message parts; itself if none."""
    if isinstance(value, str) and value.startswith(_MARKS[0]) and value.endswith(_MARKS[1]):
        try:
            part = load_json(value[len(_MARKS[0]) : -len(_MARKS[1])])[0]
            return {_OURS.get(name, name): each for name, each in part[part["type"]].items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            return value
    if isinstance(value, list):
        listed = [_without_marks(each) for each in value]
        return listed if any(a is not b for a, b in zip(listed, value, strict=True)) else value
    if isinstance(value, dict):
        made = {name: _without_marks(each) for name, each in value.items()}
        return made if any(made[name] is not value[name] for name in value) else value
    return value
