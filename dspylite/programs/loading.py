"""`load`: a whole program from the directory that `program.save(path, save_program=True)` wrote.

Not here: the state of a program that exists already (`programs/saving.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspylite.errors import DSPyError, SavingError
from dspylite.models.base import BaseLM
from dspylite.models.states import harmless_params
from dspylite.programs.base import Module
from dspylite.programs.saving import check_metadata, read_json
from dspylite.programs.whole import FORMAT, PROGRAM_FILE, read_type
from dspylite.runtime.imports import class_at
from dspylite.schema.records import Example, Prediction
from dspylite.schema.signature import InputField, OutputField, Signature, make_signature

Trust = bool | Sequence[str | type]

_OURS = "dspylite"
_CONFIG_ONLY = frozenset({"parse_retries"})
"""What a predictor's `config` holds beside request parameters."""
_RECORDS: Mapping[str, type[Example]] = {"example": Example, "prediction": Prediction}


def load(
    path: str | os.PathLike[str],
    allow_pickle: bool = False,
    *,
    trust: Trust = False,
    allow_unsafe_lm_state: bool = False,
) -> Module:
    """Make a program from the directory that `program.save(path, save_program=True)` wrote.

    Its constructors are not run. Before anything is imported, all classes that the directory names
    are compared with `trust`; those of dspylite itself need none.

    Args:
        path: The directory.
        allow_pickle: DSPy's; without effect, because no pickle is ever loaded.
        trust: Which classes may be imported, which runs the modules they are in: a list of modules
            (`"my_app"`, which includes `"my_app.programs"`), of paths (`"my_app.programs:Answer"`)
            and of classes; or True for whatever the directory names.
        allow_unsafe_lm_state: Whether an LM in it, or the `config` of a predictor, may name the
            endpoint, to which prompts then go, and an LM a class of its own.

    Raises:
        FileNotFoundError: There is no such directory.
        SavingError: It holds a pickle, names a class that is not trusted, or is damaged.

    Example:
        >>> import tempfile
        >>> from dspylite.programs.predict import ChainOfThought
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ChainOfThought("question -> answer").save(f"{folder}/qa", save_program=True)
        ...     load(f"{folder}/qa").predict.signature.signature
        'question -> reasoning, answer'
    """
    del allow_pickle
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"There is no directory '{folder}'.")
    if not folder.is_dir():
        raise SavingError(
            f"'{folder}' is a file and no directory with a whole program; if it is the state of "
            f"one, make the program and write `program.load({os.fspath(folder)!r})`."
        )
    file = folder / PROGRAM_FILE
    if not file.exists():
        if (folder / "program.pkl").exists():
            raise SavingError(
                f"'{folder}' holds a pickle, which could run code when it is loaded and is never "
                "loaded here, whatever `allow_pickle` says. Where it was made, save the state "
                "instead, `program.save('state.json')`, and load it here into the same program."
            )
        raise SavingError(f"'{folder}' holds no `{PROGRAM_FILE}`, so it is no saved program.")
    tree = read_json(file)
    check_metadata(tree.get("metadata"), file)
    if tree.get("format") != FORMAT:
        raise SavingError(f"'{file}' is no saved program; its `format` is not {FORMAT!r}.")
    node = tree.get("program")
    _check_trust(sorted(set(_named_classes(node))), trust, file)
    try:
        program = _Reader(trusted_lms=allow_unsafe_lm_state).module(node)
    except (DSPyError, AttributeError, TypeError, ValueError) as error:
        # The latter three come of attributes that are missing or of another kind.
        raise SavingError(f"'{file}' cannot be loaded: {error}") from error
    return program


def _named_classes(tree: Any) -> Iterator[str]:
    """List every class that a program names, wherever in it."""
    rest: list[Any] = [tree]
    while rest:
        each = rest.pop()
        if isinstance(each, dict):
            for key in ("module", "class"):
                if isinstance(each.get(key), str):
                    yield each[key]
            types = each.get("types")
            if isinstance(types, dict):
                yield from (path for path in types.values() if isinstance(path, str))
            rest.extend(each.values())
        elif isinstance(each, list):
            rest.extend(each)


def _check_trust(paths: Sequence[str], trust: Trust, file: Path) -> None:
    if trust is True:
        return
    listed = () if trust is False else trust
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise SavingError(f"`trust` must be True, False or a list, not {trust!r}; write `[...]`.")
    allowed = {
        f"{each.__module__}:{each.__qualname__}" if isinstance(each, type) else each
        for each in listed
    }
    refused = [path for path in paths if not (_is_ours(path) or _is_allowed(path, allowed))]
    if refused:
        modules = sorted({path.partition(":")[0] for path in refused})
        raise SavingError(
            f"'{file}' names {', '.join(refused)[:500]}, and nothing was imported. Importing runs "
            "code. If you trust these modules and whoever wrote the file, write "
            f"`load(path, trust={modules!r:.500})`."
        )


def _is_ours(path: str) -> bool:
    """Tell whether a path leads into this package, to what is loaded already."""
    module = path.partition(":")[0]
    return module.partition(".")[0] == _OURS and module in sys.modules


def _is_allowed(path: str, allowed: set[str]) -> bool:
    module = path.partition(":")[0]
    return path in allowed or any(
        module == each or module.startswith(f"{each}.") for each in allowed
    )


def _class_at(path: str) -> type:
    return class_at(path, loaded_only=_is_ours(path))


class _Reader:
    """Makes one program; every class in it has been agreed to."""

    def __init__(self, *, trusted_lms: bool) -> None:
        self._trusted_lms = trusted_lms
        self._made: dict[Any, Module] = {}

    def module(self, node: Any) -> Module:
        found = _checked(node, dict, "A module")
        if "again" in found:
            number = found["again"]
            if not isinstance(number, int) or number not in self._made:
                raise SavingError(f"It refers to a module {number!r:.50} that is not in it.")
            return self._made[number]
        path = _checked(found.get("module"), str, "The class of a module")
        cls = _class_at(path)
        if not issubclass(cls, Module):
            raise SavingError(f"`{path}` is no `Module`.")
        made: Module = cls.__new__(cls)
        self._made[_checked(found.get("number"), int, "The number of a module")] = made
        attributes = _checked(found.get("attributes"), dict, f"The attributes of `{path}`")
        for name, value in attributes.items():
            vars(made)[name] = self._value(value)
        if cls.kind == "predictor":
            self._check_config(vars(made), path)
            reset: Any = getattr(made, "reset", None)
            if callable(reset):
                reset()
            made.load_state(
                _checked(found.get("state"), dict, f"The state of `{path}`"),
                allow_unsafe_lm_state=self._trusted_lms,
            )
        return made

    def _check_config(self, attributes: dict[str, Any], path: str) -> None:
        """Take of a predictor's request parameters what an LM's may be taken from such a file."""
        if self._trusted_lms or "config" not in attributes:
            return
        config = _checked(attributes["config"], dict, f"`config` of `{path}`")
        where = f"the `config` of a `{path}`"
        attributes["config"] = harmless_params(config, where, also=_CONFIG_ONLY)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "module" in value or "again" in value:
            return self.module(value)
        match list(value.items()):
            case [("tuple", list(items))]:
                return tuple(self._value(each) for each in items)
            case [("dict", dict(pairs))]:
                return {key: self._value(each) for key, each in pairs.items()}
            case [("lm", state)]:
                return BaseLM.load_state(state, allow_custom_lm_class=self._trusted_lms)
            case [("signature", data)]:
                return _signature(_checked(data, dict, "A signature"))
            case [(("example" | "prediction") as kind, values), ("inputs", inputs)]:
                record = _RECORDS[kind](_checked(self._value(values), dict, f"A `{kind}`"))
                return record if inputs is None else record.with_inputs(*_names(inputs))
            case _:
                raise SavingError(f"An attribute has an unknown form: {value!r:.200}.")


def _signature(data: dict[str, Any]) -> type[Signature]:
    if "class" in data:
        path = _checked(data["class"], str, "The class of a signature")
        found = _class_at(path)
        if not issubclass(found, Signature):
            raise SavingError(f"`{path}` is no `Signature`.")
        return found
    types: dict[str, type] = {}
    for name, path in _checked(data.get("types"), dict, "The types of a signature").items():
        types[name] = _class_at(_checked(path, str, f"The path of `{name}`"))
    fields: dict[str, Any] = {}
    for each in _checked(data.get("fields"), list, "The fields of a signature"):
        name, field = _field(_checked(each, dict, "A field"), types)
        fields[name] = field
    return make_signature(
        fields,
        _checked(data.get("instructions"), (str, type(None)), "The instructions"),
        _checked(data.get("name"), str, "The name of a signature"),
    )


def _field(data: dict[str, Any], types: Mapping[str, type]) -> tuple[str, Any]:
    name = _checked(data.get("name"), str, "The name of a field")
    text = _checked(data.get("type"), str, f"The type of `{name}`")
    annotation = read_type(text, types)
    if annotation is None and text != "None":
        raise SavingError(f"The type of `{name}`, {text!r:.200}, is none.")
    words = {
        key: _checked(data.get(key), str, f"`{key}` of `{name}`") for key in ("desc", "prefix")
    }
    words.update(_checked(data.get("constraints"), dict, f"The constraints of `{name}`"))
    if data.get("kind") == "output":
        return name, (annotation, OutputField(**words))
    default = {"default": data["default"]} if "default" in data else {}
    return name, (annotation, InputField(**default, **words))


def _names(value: Any) -> list[str]:
    return [_checked(each, str, "An input") for each in _checked(value, list, "The inputs")]


def _checked(value: Any, wanted: Any, what: str) -> Any:
    if not isinstance(value, wanted):
        raise SavingError(f"{what} has an unknown form: {value!r:.200}.")
    return value
