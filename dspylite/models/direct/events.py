"""Reads server-sent events from bytes, as they come.

Not here: what an event says (`models/deltas.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from dspylite.errors import LMServerError

_MARK = b"\xef\xbb\xbf"


class EventReader:
    r"""Cuts a byte stream into the data of its events, whatever pieces the bytes come in.

    Comments, and fields other than `data`, are skipped; a byte order mark at the start, too.

    Args:
        max_bytes: Most bytes in all.
        model: Named in errors.

    Example:
        >>> reader = EventReader(max_bytes=1000, model="m")
        >>> list(reader.feed(b": hello\n\nda")), list(reader.feed(b"ta: [DONE]\r\n\r\n"))
        ([], [b'[DONE]'])

    Source:
        https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self, *, max_bytes: int, model: str) -> None:
        self._left = max_bytes
        self._model = model
        self._is_begun = False
        self._rest = bytearray()  # grows in place; as bytes it would be copied with every piece
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the data of every event that this piece completes.

        Raises:
            LMServerError: The stream is too long.
        """
        self._left -= len(piece)
        if self._left < 0:
            raise LMServerError(
                f"{self._model}: the stream is longer than allowed. Allow more by "
                "`max_response_bytes=`.",
                model=self._model,
            )
        rest = self._rest
        if not self._is_begun:
            piece = bytes(rest) + piece
            rest.clear()
            if len(piece) < len(_MARK) and _MARK.startswith(piece):
                rest += piece
                return
            self._is_begun = True
            piece = piece.removeprefix(_MARK)
        # A line may end in \r\n, \n or \r; a \r at the very end may be half of the first.
        if b"\n" not in piece and b"\r" not in piece and not rest.endswith(b"\r"):
            rest += piece
            return
        text = bytes(rest) + piece if rest else piece
        held = b""
        if text.endswith(b"\r"):
            text, held = text[:-1], b"\r"
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = bytearray(lines.pop() + held)
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []

    def finish(self) -> Iterator[bytes]:
        """Yield an event that was complete but for its empty line."""
        self._left += 2  # these are not the server's
        yield from self.feed(b"\n\n")
