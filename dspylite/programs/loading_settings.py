"""`load_settings`: what `settings.save` wrote, as values for `configure`.

Not here: writing them (`runtime/saved_settings.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dspylite.adapters.base import Adapter
from dspylite.adapters.json import JSONAdapter
from dspylite.adapters.sections import ChatAdapter
from dspylite.adapters.xml import XMLAdapter
from dspylite.errors import DSPyError, SavingError, nearest
from dspylite.models.base import BaseLM
from dspylite.programs.saving import read_json
from dspylite.runtime.saved_settings import FORMAT, FORMAT_VERSION
from dspylite.runtime.settings import KEYS

_ADAPTERS: Mapping[str, type[Adapter]] = {
    cls.__name__: cls for cls in (ChatAdapter, JSONAdapter, XMLAdapter)
}


def load_settings(
    path: str | os.PathLike[str],
    allow_pickle: bool = False,
    *,
    allow_unsafe_lm_state: bool = False,
) -> dict[str, Any]:
    """Read what `settings.save` wrote; `configure(**load_settings(path))` puts it in force.

    Args:
        path: The file.
        allow_pickle: DSPy's; without effect, because no pickle is ever loaded.
        allow_unsafe_lm_state: Whether an LM in it may name the endpoint, to which prompts then go,
            and a class, which is then imported.

    Raises:
        FileNotFoundError: There is no such file.
        SavingError: It is damaged, a pickle, or names what there is not.

    Example:
        >>> import tempfile
        >>> from dspylite.runtime.settings import context, settings
        >>> with tempfile.TemporaryDirectory() as folder, context(num_threads=3):
        ...     settings.save(f"{folder}/settings.json")
        ...     load_settings(f"{folder}/settings.json")["num_threads"]
        3
    """
    del allow_pickle
    tree = read_json(path)
    shown = os.fspath(path)
    if tree.get("format") != FORMAT or not isinstance(tree.get("settings"), dict):
        raise SavingError(f"'{shown}' holds no settings; its `format` is not {FORMAT!r}.")
    if tree.get("version") != FORMAT_VERSION:
        raise SavingError(
            f"'{shown}' has the version {tree.get('version')!r:.50}, and this version of dspylite "
            f"reads the version {FORMAT_VERSION}; update dspylite."
        )
    loaded: dict[str, Any] = {}
    for name, value in tree["settings"].items():
        if name not in KEYS:
            raise SavingError(f"'{shown}': there is no setting `{name}`. {nearest(name, KEYS)}")
        try:
            made: Any = value
            if name == "lm" and value is not None:
                made = BaseLM.load_state(value, allow_custom_lm_class=allow_unsafe_lm_state)
            elif name == "adapter" and value is not None:
                made = _adapter(value)
            loaded[name] = KEYS[name].check(made)
        except DSPyError as error:
            raise SavingError(f"'{shown}': the setting `{name}`: {error}") from error
    return loaded


def _adapter(state: Any) -> Adapter:
    cls = _ADAPTERS.get(str(state.get("class"))) if isinstance(state, dict) else None
    params = state.get("params") if isinstance(state, dict) else None
    if cls is None or not isinstance(params, dict):
        raise SavingError(
            f"{state!r:.200} is no adapter; there are {', '.join(_ADAPTERS)}, and one of your own "
            "is set after loading."
        )
    unknown = [
        name
        for name, value in params.items()
        if name == "callbacks" or not isinstance(value, bool | int | str | None)
    ]
    if unknown:
        raise SavingError(f"`{cls.__name__}` is not made with `{unknown[0]}` from a file.")
    try:
        return cls(**params)
    except TypeError as error:
        raise SavingError(f"`{cls.__name__}` cannot be made: {error}") from error
