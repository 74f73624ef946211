"""A kept answer as bytes and back: JSON text or raw float32, behind a small header.

A row is believed only if its digest fits its key and its bytes. Nothing is ever unpickled. Not
here: where rows are kept (`disk.py`, `memory.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspylite.schema.messages import LMOutput, LMResponse

MAX_ROW_BYTES = 16_000_000
"""Longest row; as long as the longest answer that an engine takes by default."""

_MAGIC = b"dspl\x01"
_RESPONSE, _JSON, _FLOATS = b"R", b"J", b"F"
_DIGEST_BYTES = 16
_TEXT_OR_NONE = (str, type(None))
_DICT_OR_NONE = (dict, type(None))
_HEADER_BYTES = len(_MAGIC) + 1 + _DIGEST_BYTES
_MOST_IN_STEPS = 100_000
"""Bytes that a digest is made of without letting other threads run: 0.1 ms."""
_STEP = 2047
"""From 2,048 bytes on, hashlib lets go of the GIL, and has it back when another thread pauses: some
milliseconds later, if that one computes, for a vector that takes eight microseconds."""


class BadRowError(Exception):
    """What was found under a key was not put there by this package, or has been damaged."""


def encode_row(key: str, value: Any) -> bytes:
    """Write a value as a row.

    Args:
        key: What it will be kept under; the row is worthless under any other.
        value: An `LMResponse`, an `array` of float32, or what JSON can say.

    Raises:
        TypeError: It is none of these.
    """
    payload: bytes | memoryview
    if isinstance(value, LMResponse):
        kind, payload = _RESPONSE, _json_bytes(_response_to_json(value))
    elif isinstance(value, array):
        if value.typecode != "f":
            raise TypeError(f"Only float32 arrays are kept, not those of {value.typecode!r}.")
        kind, payload = _FLOATS, memoryview(_little_endian(value)).cast("B")
    else:
        kind, payload = _JSON, _json_bytes(value)
    return b"".join((_MAGIC, kind, _digest(key, kind, payload), payload))


def decode_row(key: str, row: bytes) -> Any:
    """Read a row back.

    Raises:
        BadRowError: It is not what was written under this key.
    """
    kind, digest = row[len(_MAGIC) : len(_MAGIC) + 1], row[len(_MAGIC) + 1 : _HEADER_BYTES]
    payload = memoryview(row)[_HEADER_BYTES:]
    if not row.startswith(_MAGIC) or digest != _digest(key, kind, payload):
        raise BadRowError
    try:
        if kind == _RESPONSE:
            return _response_from_json(_from_json(payload))
        if kind == _FLOATS:
            floats = array("f")
            floats.frombytes(payload)
            return _little_endian(floats)
        if kind == _JSON:
            return _from_json(payload)
    # RecursionError: a planted row may be nested a million deep.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadRowError from error
    raise BadRowError


def _digest(key: str, kind: bytes, payload: bytes | memoryview) -> bytes:
    made = hashlib.blake2b(kind + key.encode("utf-8", "surrogatepass") + b"\0", digest_size=16)
    if len(payload) <= _MOST_IN_STEPS:
        for start in range(0, len(payload), _STEP):
            made.update(payload[start : start + _STEP])
    else:
        made.update(payload)
    return made.digest()


def _json_bytes(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _from_json(payload: memoryview) -> Any:
    return json.loads(str(payload, "utf-8", "surrogatepass"))


def _little_endian(floats: array[float]) -> array[float]:
    if sys.byteorder == "little":
        return floats
    swapped = array("f", floats)
    swapped.byteswap()
    return swapped


def _response_to_json(response: LMResponse) -> Any:
    # Without its usage: those tokens were counted once, and are not spent again.
    return {
        "outputs": [
            {
                "text": output.text,
                "finish_reason": output.finish_reason,
                "reasoning": output.reasoning,
                "tool_calls": list(output.tool_calls),
                **({"citations": list(output.citations)} if output.citations else {}),
                **({"logprobs": output.logprobs} if output.logprobs else {}),
            }
            for output in response.outputs
        ],
        "model": response.model,
        "request_id": response.request_id,
    }


def _response_from_json(found: Any) -> LMResponse:
    return LMResponse(
        outputs=tuple([_output_from_json(output) for output in found["outputs"]]),
        model=_checked(found["model"], str),
        request_id=_checked(found["request_id"], _TEXT_OR_NONE),
    )


def _output_from_json(found: Mapping[str, Any]) -> LMOutput:
    return LMOutput(
        text=_checked(found["text"], str),
        finish_reason=_checked(found["finish_reason"], _TEXT_OR_NONE),
        reasoning=_checked(found["reasoning"], _TEXT_OR_NONE),
        tool_calls=tuple(_checked(call, dict) for call in found["tool_calls"]),
        citations=tuple(_checked(each, dict) for each in found.get("citations", ())),
        logprobs=_checked(found.get("logprobs"), _DICT_OR_NONE),
    )


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def own_copy(value: Any) -> Any:
    """Return a value that its reader may change without changing what is kept.

    What is immutable is shared.
    """
    if isinstance(value, LMResponse):
        if not any(out.tool_calls or out.citations or out.logprobs for out in value.outputs):
            return value
        return replace(value, outputs=copy.deepcopy(value.outputs))
    if isinstance(value, array):
        return value[:]
    if isinstance(value, str | int | float | None):
        return value
    return copy.deepcopy(value)
