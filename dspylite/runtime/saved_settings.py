"""The settings as plain data, for a file.

LMs and adapters say themselves what they are, by `dump_state`. Not here: making settings of a file
again (`programs/loading_settings.py`), which must know these classes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from dspylite.errors import SavingError, SettingsError, nearest
from dspylite.runtime.files import write_json
from dspylite.schema.plain import plain
from dspylite.schema.secrets import saved_params

FORMAT = "dspylite-settings"
FORMAT_VERSION = 1

_COMPONENTS = frozenset({"lm", "adapter"})


def write_settings(
    path: str | os.PathLike[str], values: Mapping[str, Any], exclude_keys: Collection[str]
) -> None:
    """Write settings to a file of JSON, without secrets.

    Raises:
        SavingError: A value is no data; its key is named.
        SettingsError: There is no such key to exclude.
        OSError: The file cannot be written.
    """
    for name in exclude_keys:
        if name not in values:
            raise SettingsError(f"There is no setting `{name}`. {nearest(name, values)}".rstrip())
    saved = {
        name: _as_data(name, value) for name, value in values.items() if name not in exclude_keys
    }
    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "settings": saved})


def _as_data(name: str, value: Any) -> Any:
    remedy = f"; leave it out by `settings.save(path, exclude_keys=[{name!r}])`, and set it anew"
    if value is None:
        return None
    try:
        if name in _COMPONENTS:
            dump: Any = getattr(value, "dump_state", None)
            if dump is None:
                raise SavingError(f"{type(value).__name__} has no `dump_state()`")
            return dump()
        if name == "extra":
            kept, left_out = saved_params(value)
            if left_out:
                raise SavingError(f"secrets are never saved, and {left_out[0]!r} is named like one")
            return plain(kept, name)
        return plain(value, name)
    except SavingError as error:
        raise SavingError(f"The setting `{name}` cannot be saved: {error}{remedy}.") from error
