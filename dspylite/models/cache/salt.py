"""The secret of a cache directory, which makes fingerprints of keys worthless elsewhere.

Not here: what is fingerprinted (`keys.py`).
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

SALT_BYTES = 32
_FILE = "salt"


def read_salt(directory: Path) -> bytes | None:
    """Return a directory's salt; None if it has none.

    Raises:
        OSError: It cannot be read.
    """
    file = directory / _FILE
    try:
        found = os.lstat(file)
    except FileNotFoundError:
        return None
    # A pipe would block for ever.
    is_one = stat.S_ISREG(found.st_mode) and found.st_size == SALT_BYTES
    return file.read_bytes() if is_one else None


def make_salt(directory: Path, proposed: bytes) -> bytes:
    """Write a proposed salt, or take that of a process which was faster: linking never replaces.

    Raises:
        OSError: Nothing can be written there.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = directory / _FILE
    made = file.with_name(f"{_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write_new(made, proposed)
        # What is there and is no salt was cut short by a crash or a full disk.
        if os.path.lexists(file) and read_salt(directory) is None:
            os.replace(made, file)
            return file.read_bytes()
        try:
            os.link(made, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links; what is seen half written is made anew
            with suppress(FileExistsError):
                _write_new(file, made.read_bytes())
    finally:
        made.unlink(missing_ok=True)
    return file.read_bytes()


def _write_new(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as writer:
        writer.write(content)
