"""The one tree of exceptions.

Each is made of plain data, so that it survives pickle, copy and a process pool. Not here: turning
a foreign exception into one of these; that is done at the border that meets the foreign library
(`models/translate.py` for providers).

    DSPyError
    ├── SettingsError                  also a ValueError
    ├── SignatureError                 also a ValueError
    ├── InputFieldError                also a TypeError
    ├── ModuleError                    also a TypeError
    ├── ToolError                      also a ValueError
    ├── FlowError                      also a RuntimeError
    ├── SavingError                    also a ValueError
    ├── MissingExtraError              also an ImportError
    ├── MediaError                     also a ValueError
    │   └── MediaFetchError
    ├── AdapterParseError              also a ValueError
    │   └── TruncatedError
    ├── BatchError
    ├── BatchShapeError                also a ValueError
    ├── ClosedError                    also a RuntimeError
    ├── ItemSkippedError
    ├── ItemTimeoutError               also a TimeoutError
    ├── CallCancelledError
    ├── EvaluationError                also a ValueError
    │   └── MetricError
    ├── EmbeddingError
    │   ├── EmbeddingShapeError        also a ValueError
    │   └── EmbeddingValueError        also a ValueError
    ├── SavedEmbeddingsError           also a ValueError
    └── LMError
        ├── LMConfigurationError       also a ValueError
        │   └── LMNotConfiguredError
        ├── LMAuthError
        ├── LMInvalidRequestError
        │   ├── ContextWindowExceededError
        │   └── ContentFilterError
        ├── LMRateLimitError           retryable
        ├── LMServerError              retryable
        ├── LMTimeoutError             retryable, also a TimeoutError
        │   └── DeadlineExceededError  not retryable
        ├── LMTransportError           retryable, also a ConnectionError
        ├── OverloadedError
        ├── CircuitOpenError
        ├── BudgetExceededError
        └── LMUnexpectedError

Beside it stands `BatchInterrupted`, a `KeyboardInterrupt` that keeps what a batch had finished.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

E = TypeVar("E", bound=BaseException)

MAX_MESSAGE_CHARS = 2_000
"""Longest text kept from a provider's answer, so that an HTML error page does not fill a log."""


class ErrorResponse(NamedTuple):
    """What a web service answers; any framework can send it.

    Attributes:
        status: HTTP status.
        headers: Content type, and how long to wait where that is known.
        body: To be sent as JSON: `{"error": {"type", "code", "message"}}`.
    """

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


_HTTP_MESSAGES = {
    400: "The request cannot be answered as it is.",
    402: "The budget of this service is spent.",
    413: "The request is longer than the model can read.",
    422: "The request cannot be answered as it is.",
    499: "The request was given up.",
    429: "The model is asked too often just now; try again later.",
    500: "The service is not set up correctly.",
    502: "The model failed to answer.",
    503: "The service is overloaded; try again later.",
    504: "The model did not answer in time.",
}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Error")).lower()


class DSPyError(Exception):
    """Base of everything dspylite raises on purpose.

    Attributes of every subclass are plain data (strings, numbers, tuples, and for `BatchError` the
    user's own results), never a client, a response or a class.
    """

    http_status: ClassVar[int] = 500
    """What a web service should answer when this is why it cannot."""

    # So that a handler of all of them may read these, which `LMError` fills.
    code: str | None = None
    model: str | None = None
    provider: str | None = None
    provider_code: str | None = None
    status: int | None = None
    request_id: str | None = None
    retry_after: float | None = None

    @cached_property
    def message(self) -> str:
        """What happened and what to do next."""
        return str(self)

    def to_http(self) -> ErrorResponse:
        """Say this to the caller of a web service, without naming what lies behind the service.

        Example:
            >>> answer = LMRateLimitError("openai/m: slow down", retry_after=1.2).to_http()
            >>> answer.status, answer.headers["retry-after"], answer.body["error"]["code"]
            (429, '2', 'rate_limit')
        """
        code = str(self.code or _snake(type(self).__name__))
        headers = {"content-type": "application/json"}
        wait_s = self.retry_after
        if wait_s is not None and math.isfinite(wait_s):
            headers["retry-after"] = str(max(0, math.ceil(wait_s)))  # HTTP knows whole seconds
        elif self.http_status in {429, 503}:
            headers["retry-after"] = "1"
        shown = {"type": type(self).__name__, "code": code, "message": self.http_message}
        if self.request_id is not None:
            shown["request_id"] = self.request_id
        return ErrorResponse(status=self.http_status, headers=headers, body={"error": shown})

    @property
    def http_message(self) -> str:
        """One sentence for the caller of a web service."""
        return (
            _HTTP_MESSAGES.get(self.http_status)
            or _HTTP_MESSAGES[400 if self.http_status < 500 else 502]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from `args` and attributes, whatever the constructor's parameters are."""
        return _rebuild, (type(self), self.args, _state(self))


def _state(error: BaseException) -> dict[str, Any]:
    state = dict(error.__dict__)
    if notes := state.get("__notes__"):
        state["__notes__"] = list(notes)  # a copy of the error must not share later notes
    if isinstance(error, ImportError):  # it keeps these outside its dict
        state |= {"msg": error.msg, "name": error.name, "path": error.path}
    return state


def _rebuild(cls: type[E], args: tuple[Any, ...], state: Mapping[str, Any]) -> E:
    error = cls.__new__(cls, *args)
    error.args = args  # OSError's __new__ leaves this to an __init__ that is not run here
    for name, value in state.items():
        setattr(error, name, value)
    return error


def clip(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Shorten `text` to `limit` characters, saying how much was left out.

    Example:
        >>> clip("abcdef", 4)
        'abcd… (2 more characters)'
    """
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit} more characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, as a sentence to put at the end of a message.

    Example:
        >>> nearest("quesiton", ["question", "context"])
        'Did you mean `question`? '
        >>> nearest("zzz", ["question"])
        ''
    """
    by_lower: dict[str, str] = {}
    for word in known:
        by_lower.setdefault(word.lower(), word)
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f"Did you mean `{by_lower[matches[0]]}`? " if matches else ""


class SettingsError(DSPyError, ValueError):
    """A setting has an unknown name or an impossible value."""


class SignatureError(DSPyError, ValueError):
    """A signature cannot be built: it does not parse, repeats a name, or names an unknown type."""


class InputFieldError(DSPyError, TypeError):
    """A predictor was called with inputs its signature does not have, or without some it needs."""

    http_status = 422


class ModuleError(DSPyError, TypeError):
    """A module cannot run.

    It has neither `forward` nor `aforward`, or returned what it must not.
    """


class ToolError(DSPyError, ValueError):
    """A tool cannot be made, does not exist, or was called with arguments that do not fit.

    What a tool itself raises is raised as it is.
    """


class FlowError(DSPyError, RuntimeError):
    """Code that waits was run by a driver that cannot wait in that way."""


class SavingError(DSPyError, ValueError):
    """A program, its state or the settings cannot be written to a file, or read from one."""


class MissingExtraError(DSPyError, ImportError):
    """An optional library is needed for what was asked; the message says what to install."""


class MediaError(DSPyError, ValueError):
    """An image, audio or file cannot be taken: it is not there, too large or of another kind."""

    http_status = 422


class MediaFetchError(MediaError):
    """What was to be fetched from a URL did not come, or is not what was wanted.

    Attributes:
        status: HTTP status, where the server refused.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AdapterParseError(DSPyError, ValueError):
    """The model's answer cannot be read as the signature's outputs.

    Attributes:
        adapter_name: Class name of the adapter that read the answer.
        signature: The signature as text, such as `"question -> answer: int"`.
        lm_response: What the model wrote, clipped.
        parsed_result: What could be read, as text; None if nothing could.
    """

    http_status = 502

    def __init__(
        self,
        adapter_name: str,
        signature: object,
        lm_response: str,
        message: str | None = None,
        parsed_result: object = None,
    ) -> None:
        self.adapter_name = adapter_name
        self.signature = getattr(signature, "signature", None) or str(signature)
        self.lm_response = clip(lm_response)
        self.parsed_result = None if parsed_result is None else clip(str(parsed_result))
        self.message = clip(message or "The answer does not have the requested form.")
        text = (
            f"{self.message} `{adapter_name}` read the answer for `{self.signature}`. "
            f"The answer was: {self.lm_response!r}"
        )
        super().__init__(text)


class TruncatedError(AdapterParseError):
    """The model stopped at its length limit before the outputs were complete.

    Give it room by `max_tokens=`, or ask for less.
    """


class BatchError(DSPyError):
    """Some items of a batch failed; what finished is kept here.

    The first failure (by index) is the `__cause__`.

    Attributes:
        results: Values of the items that succeeded, by index of the item.
        errors: Exceptions of the items that failed, by index of the item.
        untried: How many items were never started, because the batch stopped early; None when the
            input was not read to its end, so that nobody knows.
    """

    def __init__(
        self,
        message: str,
        *,
        results: Mapping[int, Any],
        errors: Mapping[int, BaseException],
        untried: int | None = 0,
    ) -> None:
        super().__init__(message)
        self.results = dict(results)
        self.errors = dict(errors)
        self.untried = untried

    def to_http(self) -> ErrorResponse:
        """Answer as the first failure would, where all of them are ours."""
        failed = [self.errors[index] for index in sorted(self.errors)]
        if failed and all(isinstance(error, DSPyError) for error in failed):
            first = failed[0]
            assert isinstance(first, DSPyError)
            return first.to_http()
        return super().to_http()

    @property
    def http_message(self) -> str:
        """One sentence for the caller of a web service."""
        return "A part of the request failed."


class BatchShapeError(DSPyError, ValueError):
    """A batch function did not return one result for each item, so nobody knows whose is whose.

    Attributes:
        expected: How many items it was given.
        returned: How many results it returned; None where what it returned is no list of results.
    """

    def __init__(self, message: str, *, expected: int, returned: int | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.returned = returned


class ClosedError(DSPyError, RuntimeError):
    """What was called has been closed, and takes nothing more."""

    http_status = 503


class ItemSkippedError(DSPyError):
    """An item of a batch was never started, because the batch stopped before it.

    Attributes:
        index: The item's place in the input.
    """

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class ItemTimeoutError(DSPyError, TimeoutError):
    """An item of a batch took longer than it was given.

    Attributes:
        index: The item's place in the input.
        timeout_s: What it was given, in seconds.
    """

    http_status = 504

    def __init__(self, message: str, *, index: int, timeout_s: float) -> None:
        super().__init__(message)
        self.index = index
        self.timeout_s = timeout_s


class CallCancelledError(DSPyError):
    """Work that somebody asked to stop saw it at its next call, wait or item.

    The task that awaited it was cancelled, the client of a web service went away, or the batch it
    was part of was interrupted. It is raised in sync code, where nothing else could stop it; async
    code is cancelled by its event loop.
    """

    http_status = 499  # what proxies and servers log where the client went away


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a batch; what it had finished is kept here.

    Like any `KeyboardInterrupt` it passes `except Exception`.

    Attributes:
        results: Values of the items that succeeded, by index of the item.
        errors: Exceptions of the items that failed, by index of the item.
        untried: How many items were never started; None where nobody knows.
    """

    def __init__(
        self,
        message: str,
        *,
        results: Mapping[int, Any],
        errors: Mapping[int, BaseException],
        untried: int | None = None,
    ) -> None:
        super().__init__(message)
        self.results = dict(results)
        self.errors = dict(errors)
        self.untried = untried

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from `args` and attributes, as every error of this package."""
        return _rebuild, (type(self), self.args, _state(self))


def finished_results(error: BaseException) -> dict[int, Any]:
    """Return what batches had finished before an exception ended them, by index of the item.

    Looks at the exception and at those behind it, the causes and contexts, because an event loop
    turns Ctrl-C and cancellation into exceptions of its own.

    Args:
        error: What came out of a batch, or of the code around it: a `BatchError`, a
            `BatchInterrupted`, a `KeyboardInterrupt` out of `asyncio.run`, a cancellation.

    Returns:
        The results of the first batch found; an empty dict where there is none.

    Example:
        >>> try:
        ...     try:
        ...         raise BatchError("1 of 2 items failed", results={0: "yes"}, errors={})
        ...     finally:
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt as error:
        ...     finished_results(error)
        {0: 'yes'}
    """
    seen: set[int] = set()
    behind: list[BaseException | None] = [error]
    while behind:
        found = behind.pop(0)
        if found is None or id(found) in seen:
            continue
        if isinstance(found, BatchError | BatchInterrupted):
            return dict(found.results)
        seen.add(id(found))
        inside = found.exceptions if isinstance(found, BaseExceptionGroup) else ()
        behind += [found.__cause__, found.__context__, *inside]
    return {}


class EvaluationError(DSPyError, ValueError):
    """An evaluation cannot be run as it was asked for, or its results could not be written.

    Attributes:
        result: The finished `EvaluationResult`, where only writing it to a file failed; else None.
    """

    def __init__(self, message: str, *, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class MetricError(EvaluationError):
    """The metric raised, or returned something that is no score; what it raised is the cause.

    Attributes:
        prediction: What the program had returned.
    """

    def __init__(self, message: str, *, prediction: Any = None) -> None:
        super().__init__(message)
        self.prediction = prediction


class EmbeddingError(DSPyError):
    """An embedding function or endpoint gave something that is not one vector per text.

    Attributes:
        index: Place of the offending text in the input, where one can be named.
    """

    http_status = 502

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class EmbeddingShapeError(EmbeddingError, ValueError):
    """The number of rows is not the number of texts, or a row has another dimension."""


class EmbeddingValueError(EmbeddingError, ValueError):
    """A vector holds NaN, infinity, null or something that is not a number."""


class SavedEmbeddingsError(DSPyError, ValueError):
    """The files of a saved retriever are damaged, do not belong together or are something else."""


class LMError(DSPyError):
    """A call to a language model or an embedding model failed.

    Args:
        message: What happened and what to do next.
        code: Stable short name of the kind of failure; the class's own by default.
        model: The model asked.
        provider: The provider asked, where known.
        provider_code: The provider's own name for the failure.
        status: HTTP status, where there was one.
        request_id: The provider's id of the request, to quote to its support.
        retry_after: Seconds the provider asked to wait.
        body: What the provider answered, clipped.

    Attributes:
        attempts: One `Attempt` for each request that was made before the call was given up.
        is_outage: Whether the endpoint has answered before and is gone now.
    """

    default_code: ClassVar[str] = "lm_error"
    code: str
    retryable: ClassVar[bool] = False
    """Whether the same request may succeed when it is sent again."""

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        model: str | None = None,
        provider: str | None = None,
        provider_code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        body: str | None = None,
    ) -> None:
        self.message = clip(message)
        super().__init__(self.message)
        # Always known here, unlike in the base.
        self.code = code or self.default_code  # pyright: ignore[reportIncompatibleVariableOverride]
        self.model = model
        self.provider = provider
        self.provider_code = provider_code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.body = None if body is None else clip(body)
        self.attempts: tuple[Any, ...] = ()
        self.is_outage = False

    @property
    def retry_after_s(self) -> float | None:
        """Seconds the provider asked to wait; None if it did not say."""
        return self.retry_after


class LMConfigurationError(LMError, ValueError):
    """An LM was made or used with parameters that cannot work."""

    default_code = "configuration"


class LMNotConfiguredError(LMConfigurationError):
    """A program ran where no LM is in sight."""

    default_code = "not_configured"


class LMAuthError(LMError):
    """The key is missing, wrong, or not allowed to use the model (401, 403)."""

    http_status = 502

    default_code = "auth"


class LMInvalidRequestError(LMError):
    """The provider understood the request and refused it (400, 404, 422 and other 4xx)."""

    http_status = 400

    default_code = "invalid_request"


class ContextWindowExceededError(LMInvalidRequestError):
    """The prompt and the answer's limit together are longer than the model can take."""

    http_status = 413

    default_code = "context_window_exceeded"

    def __init__(
        self, *, model: str | None = None, message: str = "Context window exceeded", **kwargs: Any
    ) -> None:
        super().__init__(message, model=model, **kwargs)


class ContentFilterError(LMInvalidRequestError):
    """The provider's content policy refused the prompt."""

    http_status = 422

    default_code = "content_filter"


class LMRateLimitError(LMError):
    """The provider asked to slow down (429)."""

    http_status = 429

    default_code = "rate_limit"
    retryable = True


class LMServerError(LMError):
    """The provider failed (5xx), or its answer could not be understood."""

    http_status = 502

    default_code = "server"
    retryable = True


class LMTimeoutError(LMError, TimeoutError):
    """The provider did not answer in time (408, or a local limit)."""

    http_status = 504

    default_code = "timeout"
    retryable = True


class DeadlineExceededError(LMTimeoutError):
    """The time that a call was given by `deadline_s` is up; nothing more is tried."""

    default_code = "deadline_exceeded"
    retryable = False


class LMTransportError(LMError, ConnectionError):
    """The connection could not be made or broke before the answer was complete."""

    http_status = 502

    default_code = "transport"
    retryable = True


class OverloadedError(LMError):
    """So many calls wait for the same endpoint here that a further one is not let in."""

    http_status = 503

    default_code = "overloaded"


class CircuitOpenError(LMError):
    """The endpoint failed so often lately that it is left alone for a while.

    `retry_after_s` is the time until it is tried again.
    """

    http_status = 503

    default_code = "circuit_open"


class BudgetExceededError(LMError):
    """The tokens or the money of a `budget()` are spent, so the call was not made."""

    http_status = 402

    default_code = "budget_exceeded"


class LMUnexpectedError(LMError):
    """A failure that fits no other class; its message carries the original's type and text."""

    http_status = 502

    default_code = "unexpected"


def is_retryable_lm_error(error: BaseException) -> bool:
    """Tell whether sending the same request again may succeed.

    Example:
        >>> is_retryable_lm_error(LMRateLimitError("slow down"))
        True
        >>> is_retryable_lm_error(LMAuthError("bad key"))
        False
    """
    return isinstance(error, LMError) and error.retryable
