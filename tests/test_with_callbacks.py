"""`with_callbacks`: methods of users' own classes, told to callbacks as our own calls are.

Not here: what callbacks hear of our own classes (`test_calls.py`).
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import dspylite
from dspylite import BaseLM, ChatAdapter, Module, Predict, current_call, with_callbacks
from dspylite.testing import FakeLM


class Recorder:
    """Notes `(method, instance or outputs, inputs or exception, parent)` of every event."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []
        self.parents: dict[str, str | None] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def note(call_id: str, **details: Any) -> None:
            frame = current_call()
            assert frame is not None
            self.parents[call_id] = frame.parent_id
            self.told.append((name, *details.values()))

        return note

    def names(self) -> list[str]:
        return [each[0].removeprefix("on_") for each in self.told]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    with dspylite.context(callbacks=[found], lm=FakeLM(default={"answer": "a"})):
        yield found


ANSWER = "[[ ## answer ## ]]\nb\n\n[[ ## completed ## ]]"


class Search:
    """A class of a user's own."""

    def __init__(self, kind: str | None = None) -> None:
        if kind is not None:
            self.kind = kind

    @with_callbacks
    def __call__(self, query: str, *more: str, limit: int = 3, **options: Any) -> list[str]:
        if not query:
            raise ValueError("no query")
        return [query, *more]

    @with_callbacks
    async def aask(self, query: str) -> str:
        return query.upper()

    @with_callbacks
    def format(self, query: str) -> str:
        return query

    @with_callbacks
    def parse(self, text: str) -> str:
        return text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (None, "module"),
        ("module", "module"),
        ("predictor", "module"),
        ("lm", "lm"),
        ("tool", "tool"),
        ("evaluate", "evaluate"),
        ("nonsense", "module"),
    ],
)
def test_kind_of_the_instance_says_which_methods_hear_of_it(
    kind: str | None, expected: str, recorder: Recorder
) -> None:
    """A tracer draws a tool otherwise than a model."""
    class_ = type("Asked", (), {"kind": kind, "ask": with_callbacks(lambda self: 1)})
    class_().ask()
    assert recorder.names() == [f"{expected}_start", f"{expected}_end"]


def test_inputs_are_told_by_name_and_the_result_as_it_is(recorder: Recorder) -> None:
    """Defaults too, because they were used."""
    search = Search("tool")
    found = search("a", "b", source="web")
    assert found == ["a", "b"]
    assert recorder.told == [
        ("on_tool_start", search, {"query": "a", "more": ("b",), "limit": 3, "source": "web"}),
        ("on_tool_end", found, None),
    ]


def test_exception_is_told_and_raised(recorder: Recorder) -> None:
    """The caller handles it, the listener sees it."""
    with pytest.raises(ValueError, match="no query") as caught:
        Search("tool")("")
    assert recorder.told[-1] == ("on_tool_end", None, caught.value)


async def test_async_method_is_told_when_it_has_returned(recorder: Recorder) -> None:
    """Not when it has made its coroutine."""
    asked = Search("tool").aask("x")
    assert recorder.told == []
    assert await asked == "X"
    assert recorder.told[-1] == ("on_tool_end", "X", None)


def test_methods_of_an_adapter_are_told_as_an_adapters(recorder: Recorder) -> None:
    """Whoever has both `format` and `parse` is one."""
    adapter = Search()
    adapter.parse(adapter.format("x"))
    assert recorder.names() == [
        "adapter_format_start",
        "adapter_format_end",
        "adapter_parse_start",
        "adapter_parse_end",
    ]


def test_calls_below_have_the_method_as_their_parent(recorder: Recorder) -> None:
    """A trace hangs together through code of the user's own (B 1.6)."""

    class Steps:
        @with_callbacks
        def run(self) -> str:
            answer: str = Predict("question -> answer")(question="q").answer
            return answer

    assert Steps().run() == "a"
    assert recorder.names()[:2] == ["module_start", "module_start"]
    outer, inner, *_ = recorder.parents
    assert (recorder.parents[outer], recorder.parents[inner]) == (None, outer)


def test_decorated_methods_of_our_own_classes_are_told_once(recorder: Recorder) -> None:
    """DSPy programs decorate freely; a call must not be two spans."""

    class Program(Module):
        @with_callbacks
        def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

        @with_callbacks
        def forward(self, x: int) -> int:
            return self.step(x) + self.step(x)

        @with_callbacks
        def step(self, x: int) -> int:
            return x

    class Model(BaseLM):
        @with_callbacks
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return {"choices": [{"message": {"content": ANSWER}}]}

    class Plain(ChatAdapter):
        format = with_callbacks(ChatAdapter.format)
        parse = with_callbacks(ChatAdapter.parse)

    assert Program()(2) == 4
    assert recorder.names() == [
        "module_start",
        *["module_start", "module_end"] * 2,
        "module_end",
    ]
    recorder.told.clear()
    with dspylite.context(adapter=Plain(), lm=Model("own/model")):
        Predict("question -> answer")(question="q")
    assert recorder.names() == [
        "module_start",
        "adapter_format_start",
        "adapter_format_end",
        "lm_start",
        "lm_end",
        "adapter_parse_start",
        "adapter_parse_end",
        "module_end",
    ]


def test_body_of_a_module_called_directly_is_told(recorder: Recorder) -> None:
    """Nobody else would report it."""

    class Program(Module):
        @with_callbacks
        def forward(self, x: int) -> int:
            return x

    assert Program().forward(1) == 1
    assert recorder.names() == ["module_start", "module_end"]


def test_wrong_arguments_raise_as_without_the_decorator(recorder: Recorder) -> None:
    """The message names the user's function."""
    with pytest.raises(TypeError, match="query"):
        Search().format()  # type: ignore[call-arg]
    assert recorder.told == []


def test_callbacks_of_the_instance_are_told() -> None:
    """As with our own classes."""
    search, own = Search("tool"), Recorder()
    search.callbacks = [own]  # type: ignore[attr-defined]
    search("x")
    assert own.names() == ["tool_start", "tool_end"]


def test_signature_and_name_are_kept() -> None:
    """Editors and tool schemas read them."""
    assert list(inspect.signature(Search.__call__).parameters)[:2] == ["self", "query"]
    assert Search.aask.__name__ == "aask"
    assert inspect.iscoroutinefunction(Search.aask)
