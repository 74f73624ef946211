"""Files of JSON, written whole or not at all.

Not here: what stands in them (`programs/saving.py`, `runtime/saved_settings.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dspylite.errors import SavingError

MAX_FILE_BYTES = 256_000_000
"""Largest file that is read or written; guessed, far above any program's state."""


def write_json(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of plain data to a file, which is then the old one or the new one, and whole.

    Also where several threads or processes write at once, or one is killed meanwhile. The folder
    must exist.

    Raises:
        SavingError: The text would be longer than what is read.
        OSError: The file cannot be written; what stood there before is untouched.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    try:
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    except ValueError as error:  # an integer of thousands of digits
        raise SavingError(f"What is to be saved to '{target}' is no JSON: {error}") from error
    data = text.encode("utf-8")
    if len(data) > MAX_FILE_BYTES:
        raise SavingError(
            f"'{target}' would have {len(data)} bytes, more than the {MAX_FILE_BYTES} that are "
            "read; save less, such as fewer demos."
        )
    # In the same folder, so that it can be renamed; random, so that no two writers share one.
    beside = target.with_name(f".{target.name[:80]}.{os.urandom(8).hex()}.tmp")
    try:
        with open(beside, "xb") as file:
            if target.exists():
                os.chmod(beside, target.stat().st_mode & 0o777)  # what was private stays so
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a file of JSON as text.

    Raises:
        FileNotFoundError: There is none.
        SavingError: It is no file, too large, a pickle or no UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise SavingError(f"'{path}' is no file.")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise SavingError(f"'{path}' has more than the {MAX_FILE_BYTES} bytes that are read.")
    if data[:1] == b"\x80":
        raise SavingError(
            f"'{path}' is a pickle, which could run code when it is loaded and is never loaded. "
            "Save it anew as JSON with the program that wrote it."
        )
    try:
        return data.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise SavingError(f"'{path}' is no UTF-8 text: {error}") from None
