"""Types of one's own in a signature text: found where its writer stands, and nothing is run."""

import datetime
import pickle
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pydantic
import pytest

import dspylite as dspy
from dspylite.errors import SignatureError
from dspylite.schema import callers, grammar
from dspylite.schema.callers import MAX_CALLERS, type_inside, type_seen_by_callers
from tests import other_callers


class Spot(pydantic.BaseModel):
    x: int


class Chart:
    class Spot(pydantic.BaseModel):
        y: int

    size = 3

    @property
    def drawn(self) -> type:
        raise AssertionError("a property must not run")


Mood = Literal["good", "bad"]
Spots = list[Spot]


def type_of(text: str) -> Any:
    return dspy.make_signature(f"q -> a: {text}").fields["a"].annotation


# --- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Spot", Spot),
        ("list[Spot]", list[Spot]),
        ("dict[str, Spot | None]", dict[str, Spot | None]),
        ("'Spot'", Spot),
        ("Chart.Spot", Chart.Spot),
        ("Mood", Mood),
        ("Spots", Spots),
        ("datetime.timezone", datetime.timezone),
        ("other_callers.Spot", other_callers.Spot),
        ("dspy.Usage", dspy.Usage),
    ],
)
def test_names_of_the_callers_module_are_found(text: str, expected: Any) -> None:
    """DSPy programs write the names of their models into the text and nothing else."""
    assert type_of(text) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: dspy.make_signature("q: Spot -> a").fields["q"],
        lambda: dspy.Signature("q: Spot -> a").fields["q"],  # type: ignore[call-arg, attr-defined]
        lambda: dspy.Predict("q: Spot -> a").signature.fields["q"],
        lambda: dspy.ChainOfThought("q: Spot -> a").predict.signature.fields["q"],
    ],
    ids=["make_signature", "Signature", "Predict", "ChainOfThought"],
)
def test_every_way_to_write_a_text_finds_them(make: Any) -> None:
    """The package's own functions in between are passed over."""
    assert make().annotation is Spot


def test_local_types_go_before_those_of_the_module() -> None:
    """As Python itself looks a name up."""

    class Spot(pydantic.BaseModel):
        local: bool

    assert type_of_here("Spot") is not Spot
    assert dspy.make_signature("q -> a: Spot").fields["a"].annotation is Spot


def type_of_here(text: str) -> Any:
    return dspy.make_signature(f"q -> a: {text}").fields["a"].annotation


def test_nearest_caller_goes_first() -> None:
    """A helper's own types are not replaced by those of whoever uses the helper."""
    found = other_callers.signature_made_here("q -> a: Spot")
    assert found.fields["a"].annotation is other_callers.Spot


def test_further_callers_are_asked_too() -> None:
    """A helper that makes signatures from texts it is given knows none of their types."""
    found = other_callers.signature_made_here("q -> a: Chart.Spot, b: Mood")
    assert [field.annotation for field in found.output_fields.values()] == [Chart.Spot, Mood]


def test_name_that_is_no_type_is_passed_over() -> None:
    """A variable or a module by that name is not what the text means."""
    Spot = 5  # noqa: N806
    assert type_of("Spot") is globals()["Spot"]
    assert dspy.make_signature("q -> a: Spot").fields["a"].annotation is globals()["Spot"]
    assert Spot == 5


def test_callers_types_win_over_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a `Document` of their own means it; all others mean ours."""
    monkeypatch.setattr(grammar, "_registered", grammar._registered)
    grammar.register_type("Spot", lambda: datetime.date)
    grammar.register_type("Sketch", lambda: datetime.date)
    assert type_of("Spot") is Spot
    assert type_of("Sketch") is datetime.date
    assert type_of("dspy.Sketch") is datetime.date


def test_known_types_are_never_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`date` is what the grammar says, and a text without own types costs no walk."""

    def fail(name: str) -> Any:
        raise AssertionError(f"looked for {name}")

    monkeypatch.setattr("dspylite.schema.signature.type_seen_by_callers", fail)
    date = Spot
    assert dspy.make_signature("q -> never_looked_for: date").fields["never_looked_for"] is not date
    assert type_of("date") is datetime.date


def test_custom_types_end_the_search() -> None:
    """A text from a file or a user is to mean what it is said to mean, and nothing more."""
    with pytest.raises(SignatureError, match=r"The type `Spot` in .* is unknown"):
        dspy.make_signature("q -> a: Spot", custom_types={})
    with pytest.raises(SignatureError, match="The type `Mood`"):
        dspy.make_signature("q -> a: Spot, b: Mood", custom_types={"Spot": Spot})


# --- what is not kept ----------------------------------------------------------------------------


def test_equal_texts_of_two_modules_are_two_signatures() -> None:
    """A cache by the text alone would give one module the other's type."""
    ours = dspy.make_signature("q -> a: Spot")
    theirs = other_callers.signature_made_here("q -> a: Spot")
    again = dspy.make_signature("q -> a: Spot")
    assert ours.fields["a"].annotation is again.fields["a"].annotation is Spot
    assert theirs.fields["a"].annotation is other_callers.Spot


def test_equal_texts_with_equal_types_are_one_class() -> None:
    """A module that is built anew for every request does not fill the memory with classes."""
    assert dspy.make_signature("q -> a: Spot") is dspy.make_signature("q -> a: Spot")


def test_types_that_equal_others_are_not_mixed_up() -> None:
    """A cache asks `==`, and a metaclass may say yes to everything."""

    class Alike(type):
        def __eq__(cls, other: object) -> bool:
            return isinstance(other, Alike)

        def __hash__(cls) -> int:
            return 1

    def made(kind: Any) -> Any:
        Kind = kind  # noqa: N806, F841
        return dspy.make_signature("q: Kind -> a").fields["q"].annotation

    one, other = Alike("One", (), {}), Alike("Other", (), {})
    assert made(one) is one
    assert made(other) is other
    assert [repr(made(kind)) for kind in (int | str, str | int)] == ["int | str", "str | int"]


def test_threads_find_each_their_own_local_type() -> None:
    """The search reads the frames of its own thread alone."""
    barrier = threading.Barrier(16, timeout=30)

    def build(number: int) -> bool:
        Own = type(f"Own{number}", (pydantic.BaseModel,), {})  # noqa: N806
        barrier.wait()
        return all(
            dspy.make_signature("q: Own -> a").fields["q"].annotation is Own for _ in range(50)
        )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(build, range(16)))


def test_signature_with_found_types_travels() -> None:
    """It carries the types themselves."""
    made = dspy.make_signature("q: Spot -> a: list[Chart.Spot]")
    assert pickle.loads(pickle.dumps(made)).equals(made)


# --- what is never done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Nope",
        "Chart.Nope",
        "Chart.size",
        "Chart.drawn",
        "Spot.x.y",
        "sys.version",
        "antigravity.webbrowser",
    ],
)
def test_what_is_no_type_anywhere_gets_the_same_error_as_ever(text: str) -> None:
    """It names the type and the remedy; nothing is imported in the hope of finding it."""
    with pytest.raises(SignatureError) as raised:
        dspy.make_signature(f"q -> a: {text}")
    assert f"The type `{text}`" in str(raised.value)
    assert f'custom_types={{"{text}": {text}}}' in str(raised.value)
    assert "antigravity" not in sys.modules


def test_lookup_runs_no_code_of_what_it_looks_at() -> None:
    """A text may come from anywhere; properties, descriptors and lazy modules stay asleep."""

    class Trap:
        def __get__(self, instance: object, owner: type) -> Any:
            raise AssertionError("a descriptor must not run")

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            raise AssertionError("a metaclass must not run")

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a lazy module must not run")

    holder = type("Holder", (), {"inner": Trap()})
    assert type_inside(holder, ["inner"]) is None
    assert type_inside(Meta("Strict", (), {"Inner": Spot}), ["Inner"]) is Spot
    assert type_inside(Lazy("lazy"), ["Inner"]) is None
    assert type_inside(Spot(x=1), ["x"]) is None


def test_name_spaces_of_odd_classes_are_not_asked() -> None:
    """The body of a class may stand in a mapping of the user's, whose methods would run."""

    class Names(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            raise AssertionError("a name space must not run")

    frame: dict[str, Any] = Names(Own=Spot)
    assert callers._plain_get(frame, "Own") is Spot
    assert callers._plain_get(types.MappingProxyType({}), "Own") is None
    assert callers._plain_get(Spot(x=1), "Own") is None


def test_search_ends_after_so_many_callers() -> None:
    """A far caller's names are not meant, and a deep recursion is not walked to its end."""

    class FarAway:
        pass

    def seen(depth: int) -> Any:
        return seen(depth - 1) if depth else type_seen_by_callers("FarAway")

    assert seen(MAX_CALLERS - 2) is FarAway
    assert seen(MAX_CALLERS) is None


def test_package_itself_is_never_asked() -> None:
    """What our modules import is not what a user's text means."""
    assert "dspylite.schema.signature" in sys.modules
    with pytest.raises(SignatureError, match="`MappingProxyType`"):
        other_callers.called_from_here(lambda: dspy.make_signature("q: MappingProxyType -> a"))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type X = ...` came with Python 3.12")
def test_type_statements_are_types() -> None:
    """The modern spelling of an alias."""
    names: dict[str, Any] = {"dspy": dspy}
    exec("type Ids = list[int]\nmade = dspy.make_signature('q: Ids -> a')", names)
    assert names["made"].fields["q"].annotation is names["Ids"]
