"""What modules can do with files: save and load their state, as JSON, without pickle.

The form is DSPy's, so that each loads what the other saved. Not here: whole programs
(`programs/whole.py`, `programs/loading.py`).
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dspylite.adapters.values import check_tree, load_json
from dspylite.errors import SavingError
from dspylite.programs.whole import write_program
from dspylite.runtime.files import read_text, write_json

logger = logging.getLogger(__name__)

METADATA = "metadata"
FORMAT_VERSION = 1
"""Of the files; a file of a later one is refused."""

_SUFFIX_HINT = {
    ".pkl": "a pickle could run code when it is loaded, so none is written or read",
    ".pickle": "a pickle could run code when it is loaded, so none is written or read",
}


class Saved:
    """The part of `Module` that saves and loads."""

    def named_predictors(self) -> list[tuple[str, Any]]:
        """Return every predictor with its path."""
        raise NotImplementedError

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Return the state of every predictor by its path: demos, instructions, its own LM.

        Args:
            json_mode: Whether all is plain data. False keeps demos as the objects they are.

        Raises:
            SavingError: A value is no data, and `json_mode` is on; its path is named.

        Example:
            >>> from dspylite.programs.predict import ChainOfThought
            >>> ChainOfThought("question -> answer").dump_state()["predict"]["demos"]
            []
        """
        state: dict[str, Any] = {}
        for path, predictor in self.named_predictors():
            if path in state:
                raise SavingError(f"Two predictors have the path `{path}`; rename a key of a dict.")
            if type(predictor).dump_state is Saved.dump_state:
                raise SavingError(
                    f"The predictor `{path}` is of a kind of your own; give "
                    f"`{type(predictor).__name__}` a `dump_state` and a `load_state`."
                )
            try:
                state[path] = predictor.dump_state(json_mode=json_mode)
            except SavingError as error:
                raise SavingError(f"The predictor `{path}`: {error}") from error
        return state

    def load_state(self, state: Mapping[str, Any], *, allow_unsafe_lm_state: bool = False) -> Self:
        """Give every predictor its saved state; if any of it does not fit, nothing is changed.

        Predictors whose LMs were saved with equal states share one LM. Calls under way meanwhile
        may see some predictors as they were and others as they are.

        Args:
            state: What `dump_state` returned, here or in DSPy 3.
            allow_unsafe_lm_state: Whether whoever wrote the state is trusted: an LM in it may name
                the endpoint, to which prompts then go, and a class, which is then imported.

        Returns:
            The module.

        Raises:
            SavingError: It is the state of another program, or damaged.
        """
        parts = self.named_predictors()
        found = _matched([path for path, _ in parts], state)
        changes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        lms: dict[str, Any] = {}
        for path, predictor in [(path, part) for path, part in parts if path in found]:
            before = dict(vars(predictor))
            twin = copy.copy(predictor)
            try:
                twin.load_state(found[path], allow_unsafe_lm_state=allow_unsafe_lm_state)
            except SavingError as error:
                raise SavingError(f"The predictor `{path}`: {error}") from error
            lm = found[path].get("lm")
            if isinstance(lm, Mapping):
                key = json.dumps(lm, sort_keys=True, default=repr)
                twin.lm = lms.setdefault(key, twin.lm)
            after = vars(twin).items()
            changed = {name: value for name, value in after if before.get(name) is not value}
            changes.append((vars(predictor), changed))
        for attributes, changed in changes:
            attributes.update(changed)
        return self

    def save(
        self,
        path: str | os.PathLike[str],
        save_program: bool = False,
        modules_to_serialize: Sequence[Any] | None = None,
    ) -> None:
        """Write the state to a file of JSON, or the whole program to a directory.

        The file is the old one or the new one, and whole, whatever happens meanwhile. Keys, headers
        and passwords in URLs are never written.

        Args:
            path: A file that ends in `.json`; with `save_program` a directory, which is made.
            save_program: Whether to write which classes the program consists of, too, so that
                `dspylite.load` can make it without its constructor. No code is written.
            modules_to_serialize: DSPy's; must be left out, because no code is written.

        Raises:
            SavingError: Something in it is no data; it is named. Or the path does not fit.
            OSError: The file cannot be written.
        """
        if modules_to_serialize is not None:
            raise SavingError(
                "`modules_to_serialize` would write code into the file, which dspylite does not; "
                "leave it out, and install the modules where the program is loaded."
            )
        if save_program:
            write_program(self, path, metadata())
            return
        state = self.dump_state()
        if METADATA in state:
            raise SavingError(
                "A predictor of the program is named `metadata`, as what the file says of itself; "
                "give it another name."
            )
        tree = {**state, METADATA: metadata()}
        target = _state_path(path)
        try:
            check_tree(tree)
        except ValueError as error:
            raise SavingError(f"The state cannot be saved: {error}.") from error
        write_json(target, tree)

    def load(
        self,
        path: str | os.PathLike[str],
        allow_pickle: bool = False,
        allow_unsafe_lm_state: bool = False,
    ) -> None:
        """Give the predictors the state in a file that `save` wrote, here or in DSPy 3.

        Nothing in the file is run or imported. If any of it does not fit, nothing is changed.

        Args:
            path: A file that ends in `.json`.
            allow_pickle: DSPy's; without effect, because no pickle is ever loaded.
            allow_unsafe_lm_state: As of `load_state`.

        Raises:
            FileNotFoundError: There is no such file.
            SavingError: It is damaged, or the state of another program.
        """
        del allow_pickle
        state = read_json(_state_path(path))
        check_metadata(state.pop(METADATA, {}), path)
        try:
            self.load_state(state, allow_unsafe_lm_state=allow_unsafe_lm_state)
        except SavingError as error:
            raise SavingError(f"'{os.fspath(path)}' does not fit: {error}") from error


def metadata() -> dict[str, Any]:
    """Return what a file says of its making.

    DSPy compares every one of `dependency_versions` with its own, and knows no others.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "dependency_versions": {"python": python},
        "dspylite": {"format": FORMAT_VERSION},
    }


def check_metadata(given: Any, path: str | os.PathLike[str]) -> None:
    """Refuse a file of a later version.

    Raises:
        SavingError: It is one.
    """
    ours = given.get("dspylite") if isinstance(given, Mapping) else None
    version = ours.get("format", 1) if isinstance(ours, Mapping) else 1
    if version != FORMAT_VERSION:
        raise SavingError(
            f"'{os.fspath(path)}' has the format {version!r:.50}, and this version of dspylite "
            f"reads the format {FORMAT_VERSION}; update dspylite."
        )


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: There is none.
        SavingError: It is damaged: cut, nested too deep, with a key twice, or no JSON object.
    """
    text = read_text(path)
    try:
        tree = load_json(text)
    except ValueError as error:
        raise SavingError(f"'{os.fspath(path)}' is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise SavingError(f"'{os.fspath(path)}' holds no JSON object.")
    return tree


def _state_path(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if found.suffix != ".json":
        why = _SUFFIX_HINT.get(found.suffix, "a state is saved as JSON")
        raise SavingError(
            f"'{found}' must end in `.json`: {why}. For a whole program in a directory write "
            "`program.save(path, save_program=True)` and `dspylite.load(path)`."
        )
    return found


def _matched(paths: Sequence[str], state: Any) -> dict[str, Any]:
    """Find the state of each predictor.

    Raises:
        SavingError: Some have none, or some states belong to none.
    """
    if not isinstance(state, Mapping):
        raise SavingError(f"The state of a program is a dict by predictor, not {state!r:.200}.")
    given = {name: value for name, value in state.items() if name != METADATA or name in paths}
    found: dict[str, Any] = {}
    for path in paths:
        if path in given:
            found[path] = given.pop(path)
    missing = [path for path in paths if path not in found]
    if not any(_is_deep(path) for path in found):
        # DSPy does not look into a list or dict within another, so its files lack these.
        deep = [path for path in missing if _is_deep(path)]
        missing = [path for path in missing if path not in deep]
        if deep and not missing and not given:
            logger.warning("not in the saved state, and left as they are: %s", ", ".join(deep))
    if missing or given:
        parts = [
            f"{what}: {', '.join(f'`{name}`' for name in names)}"
            for what, names in (("missing in it", missing), ("not in the program", list(given)))
            if names
        ]
        raise SavingError(f"It is the state of another program; {'; '.join(parts)}.")
    for path, each in found.items():
        if not isinstance(each, Mapping):
            raise SavingError(f"The state of the predictor `{path}` is no dict: {each!r:.200}.")
    return found


def _is_deep(path: str) -> bool:
    return "][" in path
