"""The error tree: what each error carries, how it travels, and that code and docs tell one story.

Not here: which failure becomes which error; that is tested where the failure happens.
"""

import copy
import inspect
import json
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import dspylite
from dspylite import errors
from dspylite.concurrency.outcome import Outcome
from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    AdapterParseError,
    BatchError,
    CircuitOpenError,
    ContextWindowExceededError,
    DSPyError,
    ItemTimeoutError,
    LMAuthError,
    LMError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    MissingExtraError,
    OverloadedError,
    clip,
    is_retryable_lm_error,
    nearest,
)

ERRORS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "errors.md"

SAMPLES: dict[str, Any] = {
    "message": "It went wrong; do this instead.",
    "code": "a_code",
    "model": "provider/model",
    "provider": "provider",
    "provider_code": "their_code",
    "status": 418,
    "request_id": "req-1",
    "retry_after": 2.5,
    "adapter_name": "ChatAdapter",
    "signature": "question -> answer: int",
    "lm_response": "forty-two",
    "parsed_result": {"answer": "forty-two"},
    "results": {0: "zero", 2: [1, 2]},
    "errors": {1: ValueError("one")},
    "untried": 3,
    "expected": 4,
    "returned": 5,
    "index": 7,
    "timeout_s": 0.5,
    "body": "an error page",
    "result": ["a result"],
    "prediction": {"answer": "Paris"},
}
"""One value, never a default, for each constructor parameter of any error."""


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "dspylite"


def error_classes(root: type[DSPyError] = DSPyError) -> list[type[DSPyError]]:
    """Walk the real classes, so that a new one cannot be forgotten by these tests."""
    found = [root]
    for child in filter(is_ours, root.__subclasses__()):
        found += error_classes(child)
    return found


ALL = error_classes()


def sample(cls: type[DSPyError]) -> DSPyError:
    """Make an error with every parameter given, and two notes."""
    makers = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base) and is_ours(base)]
    if makers:
        wanted = dict(inspect.signature(makers[0]).parameters)
        if wanted.pop("kwargs", None):
            wanted |= inspect.signature(makers[1]).parameters
        error = cls(**{name: SAMPLES[name] for name in wanted if name != "self"})
    else:
        error = cls(SAMPLES["message"])
    error.add_note("first note")
    error.add_note("second note")
    return error


def facts(error: BaseException) -> dict[str, Any]:
    """List all that a handler or a log may read from an error, in comparable form."""
    slots = {n: getattr(error, n) for n in ("msg", "name", "path", "errno") if hasattr(error, n)}
    attributes = {name: repr(value) for name, value in vars(error).items()}
    return {"type": type(error), "args": error.args, "text": str(error), **attributes, **slots}


CARRIERS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle protocol {protocol}": lambda error, protocol=protocol: pickle.loads(
            pickle.dumps(error, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "cloudpickle": lambda error: pickle.loads(cloudpickle.dumps(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_error_is_carried_whole(cls: type[DSPyError], carrier: str) -> None:
    """An error that does not survive its journey kills the pool that carries it (B 7.1)."""
    error = sample(cls)
    assert facts(CARRIERS[carrier](error)) == facts(error)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_error_returned_by_a_process_is_whole(
    cls: type[DSPyError], pool: ProcessPoolExecutor
) -> None:
    """Outcomes of a batch hold errors as values and cross processes with them."""
    error = sample(cls)
    assert facts(pool.submit(copy.copy, error).result(30)) == facts(error)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_error_raised_in_a_process_is_whole_and_the_pool_lives_on(
    cls: type[DSPyError], pool: ProcessPoolExecutor
) -> None:
    """One upstream failure in a worker must never take the pool's other tasks with it (B 7.1)."""
    error = sample(cls)
    failing: Outcome[Any] = Outcome(index=0, ok=False, error=error)
    with pytest.raises(cls) as raised:
        pool.submit(failing.unwrap).result(30)
    assert facts(raised.value) == facts(error)
    assert pool.submit(abs, -1).result(30) == 1


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_copy_does_not_share_later_notes(cls: type[DSPyError], carrier: str) -> None:
    """Two items that failed with one error are annotated each on its own."""
    error = sample(cls)
    twin = CARRIERS[carrier](error)
    error.add_note("of the original")
    twin.add_note("of the copy")
    assert error.__notes__ == ["first note", "second note", "of the original"]
    assert twin.__notes__ == ["first note", "second note", "of the copy"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_missing_extra_error_keeps_what_import_errors_have(carrier: str) -> None:
    """Handlers of `ImportError` read `.name` and `.msg`, which lie outside the attributes' dict."""
    error = MissingExtraError("Install it.", name="rich", path="/x")
    twin = CARRIERS[carrier](error)
    assert (twin.msg, twin.name, twin.path) == ("Install it.", "rich", "/x")


def test_error_group_of_ours_is_carried_whole() -> None:
    """Task groups raise groups, and these cross processes too."""
    group = ExceptionGroup("two", [sample(LMTimeoutError), sample(BatchError)])
    twin = pickle.loads(pickle.dumps(group))
    assert [facts(error) for error in twin.exceptions] == [facts(e) for e in group.exceptions]


# --- one tree ------------------------------------------------------------------------------------


def drawn_tree(text: str) -> dict[str, tuple[str | None, str]]:
    """Read a drawn tree into class name -> (parent's name, remark)."""
    tree: dict[str, tuple[str | None, str]] = {}
    open_branches: list[str] = []
    drawing = text[text.index("DSPyError\n") :]
    margin = " " * len(text[: text.index("DSPyError\n")].rpartition("\n")[2])
    for line in drawing.splitlines():
        match = re.match(r"^([│├└─ ]*)(?P<name>\w+)\s*(?P<remark>.*)$", line.removeprefix(margin))
        if match is None:
            break
        depth = len(match[1]) // 4
        del open_branches[depth:]
        assert match["name"] not in tree, f"{match['name']} is drawn twice"
        tree[match["name"]] = (open_branches[-1] if open_branches else None, match["remark"])
        open_branches.append(match["name"])
    return tree


def real_tree() -> dict[str, tuple[str | None, str]]:
    tree: dict[str, tuple[str | None, str]] = {}
    for cls in ALL:
        parents = [base.__name__ for base in cls.__bases__ if issubclass(base, DSPyError)]
        others = [b.__name__ for b in cls.__bases__ if not issubclass(b, DSPyError)]
        article = {name: "an" if name[0] in "AEIOU" else "a" for name in others}
        own = vars(cls).get("retryable") if cls is not errors.LMError else None
        remarks = [] if own is None else ["retryable" if own else "not retryable"]
        remarks += [f"also {article[name]} {name}" for name in others if name != "Exception"]
        tree[cls.__name__] = (parents[0] if parents else None, ", ".join(remarks))
    return tree


def test_tree_in_the_docstring_is_the_real_one() -> None:
    """Whoever opens the file sees what there is to catch."""
    assert drawn_tree(errors.__doc__ or "") == real_tree()


def test_tree_in_the_docs_is_the_real_one() -> None:
    """The page is what users write their handlers from."""
    assert drawn_tree(ERRORS_PAGE.read_text(encoding="utf-8")) == real_tree()


def test_every_error_is_public_and_of_the_one_file() -> None:
    """An error that can reach users can be caught by the name they import."""
    assert [cls for cls in ALL if getattr(dspylite, cls.__name__, None) is not cls] == []
    assert {cls.__name__ for cls in ALL} <= set(dspylite.__all__)
    assert {cls.__module__ for cls in ALL} == {errors.__name__}


# --- facts ---------------------------------------------------------------------------------------


def test_retryable_is_true_for_what_may_pass_and_false_for_all_else() -> None:
    """Retrying a refusal wastes money, and not retrying an outage loses work."""
    retryable = {cls.__name__ for cls in ALL if is_retryable_lm_error(sample(cls))}
    assert retryable == {
        "LMRateLimitError",
        "LMServerError",
        "LMTimeoutError",
        "LMTransportError",
    }


@pytest.mark.parametrize(
    "error", [ValueError("x"), TimeoutError(), ConnectionError(), SystemExit()]
)
def test_foreign_errors_are_never_retryable(error: BaseException) -> None:
    """Only what was translated at the border is known well enough to be sent again."""
    assert is_retryable_lm_error(error) is False


def test_retry_after_has_its_unit_in_a_second_name() -> None:
    """`retry_after` is DSPy's spelling; `retry_after_s` says that it is seconds."""
    assert LMRateLimitError("slow", retry_after=3).retry_after_s == 3
    assert LMRateLimitError("slow").retry_after_s is None


def test_context_window_error_takes_dspys_arguments() -> None:
    """DSPy programs raise it without a positional message."""
    error = ContextWindowExceededError(model="m")
    assert (error.model, error.message) == ("m", "Context window exceeded")
    assert error.code == "context_window_exceeded"


def test_lm_error_text_is_clipped() -> None:
    """A provider's HTML page must not fill the log."""
    error = LMError("<html>" + "x" * 1_000_000)
    assert len(str(error)) < MAX_MESSAGE_CHARS + 50
    assert "more characters" in str(error)


def test_adapter_parse_error_clips_each_of_its_texts() -> None:
    """A runaway answer of megabytes is quoted, not repeated, also by the reason it gives."""
    long = "\N{SNOWMAN}" * 1_000_000
    error = AdapterParseError("ChatAdapter", "question -> answer", long, long, {"answer": long})
    for text in (error.lm_response, error.message, error.parsed_result or ""):
        assert len(text) < MAX_MESSAGE_CHARS + 50
    assert len(str(error)) < 3 * MAX_MESSAGE_CHARS


def test_adapter_parse_error_names_adapter_signature_and_answer() -> None:
    """These three are what one needs to reproduce the failure."""
    error = AdapterParseError("ChatAdapter", dspylite.make_signature("q -> n: int"), "many")
    assert error.signature == "q -> n"
    assert all(part in str(error) for part in ("`ChatAdapter`", "`q -> n`", "'many'"))


def test_batch_error_keeps_results_and_errors_by_index() -> None:
    """What finished was paid for and is never thrown away, also across a process border."""
    error = BatchError("1 of 3 failed.", results={0: "a", 2: "c"}, errors={1: KeyError("b")})
    twin = pickle.loads(pickle.dumps(error))
    assert twin.results == {0: "a", 2: "c"}
    assert repr(twin.errors) == repr({1: KeyError("b")})
    assert twin.untried == 0


def test_batch_error_is_not_changed_by_its_makers_dicts() -> None:
    """The run that made it may go on writing into its own tables."""
    results: dict[int, Any] = {0: "a"}
    error = BatchError("failed", results=results, errors={})
    results[1] = "late"
    assert error.results == {0: "a"}


def test_timeouts_are_caught_as_the_builtin_timeout() -> None:
    """Code that knows nothing of dspylite handles `TimeoutError`."""
    with pytest.raises(TimeoutError):
        raise ItemTimeoutError("late", index=0, timeout_s=1.0)
    with pytest.raises(TimeoutError):
        raise LMTimeoutError("late")


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [("abcd", 4, "abcd"), ("abcde", 4, "abcd… (1 more characters)"), ("", 4, "")],
)
def test_clip_says_how_much_it_left_out(text: str, limit: int, expected: str) -> None:
    """A cut that is not marked would be taken for the whole."""
    assert clip(text, limit) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("num_thread", "Did you mean `num_threads`? "), ("LM", "Did you mean `lm`? "), ("zzz", "")],
)
def test_nearest_suggests_only_what_is_near(name: str, expected: str) -> None:
    """A wild guess would mislead more than no guess."""
    assert nearest(name, ["num_threads", "lm"]) == expected


# --- over HTTP -----------------------------------------------------------------------------------

HTTP = {
    "DSPyError": (500, "dspy"),
    "SettingsError": (500, "settings"),
    "SignatureError": (500, "signature"),
    "InputFieldError": (422, "input_field"),
    "ModuleError": (500, "module"),
    "ToolError": (500, "tool"),
    "FlowError": (500, "flow"),
    "SavingError": (500, "saving"),
    "MissingExtraError": (500, "missing_extra"),
    "MediaError": (422, "media"),
    "MediaFetchError": (422, "media_fetch"),
    "AdapterParseError": (502, "adapter_parse"),
    "TruncatedError": (502, "truncated"),
    "BatchError": (500, "batch"),
    "BatchShapeError": (500, "batch_shape"),
    "ClosedError": (503, "closed"),
    "ItemSkippedError": (500, "item_skipped"),
    "ItemTimeoutError": (504, "item_timeout"),
    "CallCancelledError": (499, "call_cancelled"),
    "EvaluationError": (500, "evaluation"),
    "MetricError": (500, "metric"),
    "EmbeddingError": (502, "embedding"),
    "EmbeddingShapeError": (502, "embedding_shape"),
    "EmbeddingValueError": (502, "embedding_value"),
    "SavedEmbeddingsError": (500, "saved_embeddings"),
    "LMError": (500, "lm_error"),
    "LMConfigurationError": (500, "configuration"),
    "LMNotConfiguredError": (500, "not_configured"),
    "LMAuthError": (502, "auth"),
    "LMInvalidRequestError": (400, "invalid_request"),
    "ContextWindowExceededError": (413, "context_window_exceeded"),
    "ContentFilterError": (422, "content_filter"),
    "LMRateLimitError": (429, "rate_limit"),
    "LMServerError": (502, "server"),
    "LMTimeoutError": (504, "timeout"),
    "DeadlineExceededError": (504, "deadline_exceeded"),
    "LMTransportError": (502, "transport"),
    "OverloadedError": (503, "overloaded"),
    "CircuitOpenError": (503, "circuit_open"),
    "BudgetExceededError": (402, "budget_exceeded"),
    "LMUnexpectedError": (502, "unexpected"),
}
"""Status and code for the caller of a web service. A key that is wrong is the service's fault, not
its caller's, so it is no 401."""

SECRETS = ("provider/model", "their_code", "It went wrong", "an error page", "forty-two")
"""What `SAMPLES` holds of things that no caller of a service may see."""


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_has_a_status_and_a_code_for_http(cls: type[DSPyError]) -> None:
    """A client of the service decides by these whether to come again (B 9C)."""
    error = sample(cls)
    if isinstance(error, LMError):
        error.code = type(error).default_code
    answer = error.to_http()
    assert (answer.status, answer.body["error"]["code"]) == HTTP[cls.__name__]
    assert answer.body["error"]["type"] == cls.__name__
    assert answer.headers["content-type"] == "application/json"
    assert 400 <= answer.status < 600


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_body_for_http_is_json_and_names_nothing_behind_the_service(cls: type[DSPyError]) -> None:
    """Models, endpoints, prompts and what a provider wrote are nobody else's business (B 9C)."""
    answer = sample(cls).to_http()
    text = json.dumps([answer.status, answer.headers, answer.body])
    assert json.loads(text) == [answer.status, answer.headers, answer.body]
    assert [secret for secret in SECRETS if secret in text] == []
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) <= {"type", "code", "message", "request_id"}
    assert answer.body["error"]["message"].endswith(".")


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_answer_for_http_is_the_same_after_a_journey(
    cls: type[DSPyError], pool: ProcessPoolExecutor
) -> None:
    """The web process answers for errors that were raised in a worker process (B 9C)."""
    error = sample(cls)
    assert pickle.loads(pickle.dumps(error)).to_http() == error.to_http()
    assert pool.submit(cls.to_http, error).result(30) == error.to_http()


@pytest.mark.parametrize(
    ("wait_s", "header"),
    [(0, "0"), (0.001, "1"), (1, "1"), (1.2, "2"), (3600.0, "3600"), (-5, "0")],
)
@pytest.mark.parametrize("cls", [LMRateLimitError, LMServerError, CircuitOpenError])
def test_wait_is_rounded_up_to_whole_seconds_for_http(
    cls: type[LMError], wait_s: float, header: str
) -> None:
    """HTTP knows no fractions, and a client that comes too early is refused again (B 9C)."""
    assert cls("later", retry_after=wait_s).to_http().headers["retry-after"] == header


@pytest.mark.parametrize("wait_s", [None, math.inf, math.nan])
def test_only_what_passes_by_itself_has_a_wait_for_http(wait_s: float | None) -> None:
    """429 and 503 without a hint make clients hammer; on a 502 a hint would be a guess (B 9C)."""
    for cls in (LMRateLimitError, OverloadedError, CircuitOpenError):
        assert cls("later", retry_after=wait_s).to_http().headers["retry-after"] == "1"
    for cls in (LMServerError, LMAuthError, LMTimeoutError):
        assert "retry-after" not in cls("no", retry_after=wait_s).to_http().headers


def test_request_id_is_told_over_http_where_there_is_one() -> None:
    """It is what the caller's support and ours have in common (B 9C)."""
    assert LMServerError("x", request_id="req-7").to_http().body["error"]["request_id"] == "req-7"
    assert "request_id" not in LMServerError("x").to_http().body["error"]


def test_an_error_of_the_users_own_tree_has_an_answer_for_http() -> None:
    """Programs add errors with statuses of their own, which must not fail in the handler."""

    class TeapotError(DSPyError):
        http_status = 418

    class BackendError(LMError):
        http_status = 599

        @property
        def http_message(self) -> str:
            return "The backend sleeps."

    class StorageError(DSPyError):
        http_status = 507

    teapot = TeapotError("short and stout").to_http()
    assert (teapot.status, teapot.body["error"]["code"]) == (418, "teapot")
    assert teapot.body["error"]["message"] == "The request cannot be answered as it is."
    assert StorageError("full").to_http().body["error"]["message"] == "The model failed to answer."
    backend = BackendError("x").to_http()
    assert (backend.status, backend.body["error"]["message"]) == (599, "The backend sleeps.")


def test_batch_whose_failures_are_ours_answers_as_the_first_of_them() -> None:
    """The client of a service must learn how long to wait, not that a batch was used."""
    busy = LMRateLimitError("slow down", retry_after=7)
    error = BatchError("2 of 3", results={1: "a"}, errors={2: LMServerError("down"), 0: busy})
    assert error.to_http() == busy.to_http()
    assert error.to_http().headers["retry-after"] == "7"


def test_batch_with_a_failure_of_other_code_is_an_error_of_the_service() -> None:
    """It is no failure of the model, and what it says is nobody's business."""
    answer = BatchError("1 of 1", results={}, errors={0: KeyError("secret")}).to_http()
    assert (answer.status, answer.body["error"]["message"]) == (
        500,
        "A part of the request failed.",
    )
