"""A whole program as plain data: its classes by name, its attributes, the state of its predictors.

Not here: making the program from it (`programs/loading.py`).
"""

from __future__ import annotations

import logging
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspylite.adapters.values import check_tree
from dspylite.errors import SavingError, SignatureError
from dspylite.models.base import BaseLM
from dspylite.runtime.files import write_json
from dspylite.runtime.imports import path_of
from dspylite.schema.grammar import KNOWN_TYPES, type_name
from dspylite.schema.plain import plain
from dspylite.schema.records import Example, Prediction
from dspylite.schema.secrets import is_secret_attribute, saved_params, saved_url
from dspylite.schema.signature import Field, Signature, SignatureMeta, make_signature

logger = logging.getLogger(__name__)

PROGRAM_FILE = "program.json"
FORMAT = "dspylite-program"

_NOT_SAVED = frozenset({"history"})
"""What belongs to the process and not to the program."""
_OF_STATE = frozenset({"demos", "traces", "train", "lm"})
"""Attributes of a predictor that its state holds."""
_MAX_DEPTH = 24
"""Deepest nesting of an attribute; with its marks it stays below the 64 levels that are read."""


def write_program(program: Any, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Write a program to a directory, which is made. What may be secret is left out, and logged.

    Raises:
        SavingError: A class cannot be found by its name, or an attribute is no data.
        OSError: The directory cannot be written.
    """
    folder = Path(path)
    if folder.suffix:
        raise SavingError(
            f"'{folder}' must be a directory, without a suffix, for a whole program; for its state "
            "alone leave `save_program` out."
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is no directory.")
    writer = _Writer()
    tree = {"format": FORMAT, "metadata": dict(metadata), "program": writer.module(program, "")}
    try:
        check_tree(tree)
    except ValueError as error:
        raise SavingError(f"The program cannot be saved: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PROGRAM_FILE, tree)
    if writer.left_out:
        logger.warning(
            "not saved, because secrets may be in it: %s; set it again after loading",
            ", ".join(writer.left_out),
        )


def is_module(value: object) -> bool:
    """Tell whether a value is a part of a program, by what it says of itself."""
    return getattr(type(value), "kind", None) in {"module", "predictor"} and hasattr(
        value, "named_predictors"
    )


class _Writer:
    """Writes one program; a module that stands in several places is written once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self.left_out: list[str] = []

    def module(self, module: Any, where: str) -> dict[str, Any]:
        if (number := self._numbers.get(id(module))) is not None:
            return {"again": number}
        self._numbers[id(module)] = number = len(self._numbers)
        cls = type(module)
        node: dict[str, Any] = {
            "module": path_of(cls, f"`{where}`" if where else "The program"),
            "number": number,
        }
        is_predictor = cls.kind == "predictor"
        attributes: dict[str, Any] = {}
        for name, value in list(vars(module).items()):
            if name in _NOT_SAVED or name.startswith("__") or (is_predictor and name in _OF_STATE):
                continue
            if name == "callbacks" and not value:
                continue
            place = f"{where}.{name}" if where else name
            if is_predictor and name == "config":
                kept, left_out = saved_params(value)
                self.left_out += [f"{place}.{each}" for each in left_out]
                attributes[name] = self.value(kept, place, 0)
            elif not self._is_secret(name, value, place):
                attributes[name] = self.value(value, place, 0)
        node["attributes"] = attributes
        if is_predictor:
            try:
                node["state"] = module.dump_state()
            except SavingError as error:
                raise SavingError(f"The predictor `{where or 'self'}`: {error}") from error
        return node

    def _is_secret(self, name: str, value: Any, where: str) -> bool:
        """Tell whether a value must not be in a file, and note it if so."""
        if not is_secret_attribute(name, value):
            return False
        self.left_out.append(where)
        return True

    def value(self, value: Any, where: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise SavingError(f"`{where}` nests deeper than {_MAX_DEPTH} levels, or holds itself.")
        if is_module(value):
            return self.module(value, where)
        if isinstance(value, SignatureMeta):
            return {"signature": signature_as_data(typing.cast("type[Signature]", value), where)}
        if isinstance(value, BaseLM):
            return {"lm": value.dump_state()}
        if type(value) in (list, tuple):
            made = [self.value(each, f"{where}[{i}]", depth + 1) for i, each in enumerate(value)]
            return made if type(value) is list else {"tuple": made}
        if type(value) is dict:
            for key in value:
                if not isinstance(key, str):
                    raise SavingError(
                        f"A key of `{where}` is {key!r}; JSON has texts as keys only."
                    )
            pairs: dict[str, Any] = {}
            for key, each in value.items():
                place = f"{where}[{key!r}]"
                if not self._is_secret(key, each, place):
                    pairs[key] = self.value(each, place, depth + 1)
            return {"dict": pairs}
        if type(value) is Example or type(value) is Prediction:
            values = dict(value.items(include_dspy=True))
            inputs: frozenset[str] | None = vars(value).get("_input_keys")
            return {
                type(value).__name__.lower(): self.value(values, where, depth + 1),
                "inputs": None if inputs is None else sorted(inputs),
            }
        if type(value) is str:
            if (public := saved_url(value)) != value:
                self.left_out.append(f"{where} (a part)")
            return plain(public, where)
        if value is None or type(value) in (bool, int, float):
            return plain(value, where)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise SavingError(
            f"`{where}` is a `{kind}`, which no file can hold: {value!r:.200}. Save only the state "
            "(`program.save('state.json')`) and load it into a program that its constructor made, "
            "or take the attribute away before saving."
        )


def signature_as_data(signature: type[Signature], where: str) -> dict[str, Any]:
    """Return what a signature is made from: the class that was written, or its fields.

    Raises:
        SavingError: A type cannot be named.
    """
    if signature.__module__ != Signature.__module__:
        try:
            return {"class": path_of(signature, f"`{where}`")}
        except SavingError:
            pass  # made in a function: written by its fields
    types: dict[str, str] = {}
    fields = [_field_as_data(field, where, types) for field in signature.fields.values()]
    given = next((t for b in signature.__mro__ if (t := vars(b).get("__instructions__"))), None)
    return {
        "name": signature.__name__,
        "instructions": given,
        "fields": fields,
        "types": types,
    }


def _field_as_data(field: Field, where: str, types: dict[str, str]) -> dict[str, Any]:
    place = f"{where}.{field.name}"
    text = type_name(field.annotation)
    own = {cls.__name__: cls for cls in _classes_in(field.annotation)}
    own = {name: cls for name, cls in own.items() if KNOWN_TYPES.get(name) is not cls}
    if read_type(text, own) != field.annotation:
        raise SavingError(
            f"The type of `{place}`, `{text}`, cannot be written as text; declare the signature as "
            "a class at the top of a module."
        )
    for name, cls in own.items():
        path = path_of(cls, f"A type of `{place}`")
        if types.setdefault(name, path) != path:
            raise SavingError(f"Two types of `{where}` are named `{name}`; rename one.")
    data: dict[str, Any] = {
        "name": field.name,
        "kind": field.kind,
        "type": text,
        "desc": field.desc,
        "prefix": field.prefix,
        "constraints": plain(dict(field.constraints), place),
    }
    if not field.required:
        data["default"] = plain(field.default, f"{place} (default)")
        if data["default"] != field.default:
            raise SavingError(f"The default of `{place}`, {field.default!r:.200}, is no JSON.")
    return data


def read_type(text: str, types: Mapping[str, type]) -> Any:
    """Read a type from its text; None where it is none.

    Args:
        text: As in a signature text.
        types: The classes that it may name beside the built-in ones.
    """
    try:
        made = make_signature(f"value: {text} -> x", custom_types=types)
    except SignatureError:
        return None
    return made.input_fields["value"].annotation if len(made.fields) == 2 else None


def _classes_in(annotation: Any) -> list[type]:
    """List the classes that a type names, such as `Person` in `list[Person]`."""
    found: list[type] = []
    rest: list[Any] = [annotation]
    while rest:
        each = rest.pop()
        if typing.get_origin(each) is typing.Literal:
            continue
        if inner := typing.get_args(each):
            rest.extend(inner)
        elif isinstance(each, type) and each is not type(None):
            found.append(each)
    return found
