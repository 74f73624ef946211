"""Classes by name: what a file may name, once it is trusted to.

Not here: who may be trusted, which the callers ask first.
"""

from __future__ import annotations

import importlib
import sys

from dspylite.errors import SavingError

MAX_PATH_CHARS = 1_000


def path_of(cls: type, what: str) -> str:
    """Return `"module:Name"`, by which another process finds a class.

    Raises:
        SavingError: It is not found by that name, or only in the script that runs.
    """
    path = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__":
        raise SavingError(
            f"{what} is `{cls.__qualname__}` of the script that runs, which no other process can "
            "import; move the class into a module, or save only the state: "
            "`program.save('state.json')`."
        )
    if _found(sys.modules.get(cls.__module__), cls.__qualname__) is not cls:
        raise SavingError(
            f"{what} is `{path}`, which is not found by that name; define the class at the top of "
            "its module, or save only the state: `program.save('state.json')`."
        )
    return path


def class_at(path: str, *, loaded_only: bool = False) -> type:
    """Import the module of a path and return the class that it names.

    Call it only for a path that the user has agreed to: importing runs the module.

    Args:
        path: `"module:Name"` or, as DSPy writes it, `"module.Name"`.
        loaded_only: Whether nothing is imported.

    Raises:
        SavingError: There is no such module or class.
    """
    module_name, colon, name = path.partition(":")
    parts = f"{module_name}.{name}".split(".") if colon else path.split(".")
    if len(path) > MAX_PATH_CHARS or len(parts) < 2 or not all(p.isidentifier() for p in parts):
        raise SavingError(f"{path[:200]!r} is no path of a class, as 'my_app.programs:Answer' is.")
    # Where DSPy's spelling does not say which part is the module, the longest that there is.
    lengths = [len(module_name.split("."))] if colon else range(len(parts) - 1, 0, -1)
    for length in lengths:
        module_name = ".".join(parts[:length])
        module: object = sys.modules.get(module_name)
        if module is None and not loaded_only:
            module = _imported(module_name, path, may_be_class=length > 1 and not colon)
        found = _found(module, ".".join(parts[length:]))
        # What a module has only imported itself is not what was saved.
        if isinstance(found, type) and found.__module__ == module_name:
            return found
    raise SavingError(f"There is no class `{path}`; it was renamed or moved, perhaps.")


def _imported(module_name: str, path: str, *, may_be_class: bool) -> object:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        if may_be_class and isinstance(error, ModuleNotFoundError) and error.name == module_name:
            return None
        raise SavingError(
            f"The class `{path}` cannot be imported: {error}. Install or move what it is in."
        ) from error


def _found(module: object, name: str) -> object:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
