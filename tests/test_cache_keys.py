"""What makes two requests equal, and what of them can be seen in a key.

Not here: calls that use the keys (`test_cache_calls.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import dspylite as dspy
from dspylite.models.cache.cached import Cached
from dspylite.models.cache.keys import describe, endpoint_text, fingerprint, key_of
from dspylite.schema.messages import LMRequest

SALT = b"s" * 32
TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(
    [
        "\ud83d",
        "\ude00",
        "\ud83d\ude00",
        "😀",
        "",
        "1",
        "true",
        "null",
        "NaN",
        '"',
        "\\u0031",
        "é",
        "é",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.sampled_from([1, 1.0, True, 0, 0.0, -0.0, False, math.inf, -math.inf, 10**30])
    | TEXTS
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}) | st.fixed_dictionaries(
    {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": TEXTS})}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": TEXTS | st.none() | st.lists(PARTS, max_size=2),
        },
        optional={"tool_calls": st.lists(VALUES, max_size=2), "name": TEXTS},
    ),
    max_size=3,
)
PARAMS = st.dictionaries(
    st.sampled_from(["temperature", "n", "stop", "tools", "extra_body", "seed", "top_p"]),
    VALUES,
    max_size=4,
)
REQUESTS = st.builds(
    lambda **fields: {"model": "openai/m", **fields}, messages=MESSAGES, params=PARAMS
)


def requested(fields: Mapping[str, Any], **changes: Any) -> LMRequest:
    return LMRequest(**{**fields, **changes})


def key(request: LMRequest, *, kind: str = "chat", namespace: str | None = None) -> str:
    return key_of(describe(request, kind=kind, namespace=namespace, salt=lambda: SALT))


def plain(value: Any) -> str:
    """Write a request so that equal ones, and no others, are equal: 1 is not 1.0, nor True."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {plain(value[name])}' for name in sorted(value))}}}"
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else repr(value)


def turned_around(value: Any) -> Any:
    """Write the names of all dicts in another order."""
    if isinstance(value, dict):
        return {name: turned_around(item) for name, item in reversed(value.items())}
    if isinstance(value, list):
        return [turned_around(item) for item in value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value in it."""
    found = [path]
    if isinstance(value, dict):
        for name, item in value.items():
            found += places(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*path, index))
    return found


def with_change(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = with_change(value[path[0]], path[1:], new)
    return changed


# --- equal and unequal ---------------------------------------------------------------------------


@given(REQUESTS, REQUESTS)
def test_two_requests_share_a_key_only_if_they_are_the_same(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    """1, 1.0, True and "1" are four requests, as are half and whole characters (B 5.3)."""
    assert (key(requested(first)) == key(requested(second))) == (plain(first) == plain(second))


def test_values_that_look_alike_are_told_apart() -> None:
    """Also two halves of a character from the whole, and an accent from its letter (B 5.3)."""
    looks = [1, 1.0, True, "1", [1], {"1": 1}, 0, 0.0, -0.0, False, None, "null", "", [], {}, [[]]]
    looks += [math.nan, "NaN", math.inf, -math.inf, 1e16, 10**16, "\u00e9", "e\u0301"]
    looks += ["\ud83d" + "\ude00", "\U0001f600", "\ud83d", "\ude00", "\\ud83d"]
    assert len({key_of({"value": value}) for value in looks}) == len(looks)
    assert len({key_of({"value": {str(value): 1}}) for value in looks[-7:]}) == 7


@given(REQUESTS, st.data())
def test_a_change_in_any_one_place_is_another_request(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    """However deep it lies (B 5.3)."""
    open_to_change = [path for path in places(fields) if len(path) > 1]
    if not open_to_change:
        return
    path = data.draw(st.sampled_from(open_to_change))
    new = data.draw(VALUES)
    changed = with_change(fields, path, new)
    assert (key(requested(changed)) == key(requested(fields))) == (plain(changed) == plain(fields))


@given(REQUESTS)
def test_the_order_of_names_never_matters(fields: dict[str, Any]) -> None:
    """Dicts that are equal make equal requests (B 5.3)."""
    turned = turned_around(fields)
    assert key(requested(turned)) == key(requested(fields))
    frozen = requested({**fields, "params": MappingProxyType(fields["params"])})
    assert key(frozen) == key(requested(fields))


@given(st.lists(st.integers(0, 5), max_size=4), st.randoms())
def test_the_order_of_lists_matters(items: list[int], chance: Any) -> None:
    """Messages, stop words and tools are told in an order (B 5.3)."""
    shuffled = chance.sample(items, len(items))
    keys = [key_of({"stop": each}) for each in (items, shuffled)]
    assert (keys[0] == keys[1]) == (items == shuffled)


@given(REQUESTS, st.booleans())
def test_how_a_call_is_made_is_no_part_of_its_key(fields: dict[str, Any], streamed: bool) -> None:
    """Sync, awaited or streamed; patient or not (B 5.3)."""
    params = {**fields["params"], "timeout": 3, "max_response_bytes": 5, "stream_options": {"a": 1}}
    other = requested(
        {**fields, "params": params}, stream=streamed, asked=fields["params"], cache=streamed
    )
    assert key(other) == key(requested(fields))


PLAIN: dict[str, Any] = {"model": "openai/m", "messages": [{"role": "user", "content": "q"}]}


def test_each_part_of_a_request_is_part_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, kind, endpoint, parameters, messages, rollout, namespace, key, headers (B 5.3)."""
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    made = [
        key(requested(PLAIN)),
        key(requested(PLAIN, model="openai/n")),
        key(requested(PLAIN, model="hosted_vllm/m")),
        key(requested(PLAIN), kind="text"),
        key(requested(PLAIN, params={"api_base": "http://a/v1"})),
        key(requested(PLAIN, params={"api_base": "http://b/v1"})),
        key(requested(PLAIN, params={"temperature": 1})),
        key(requested(PLAIN, params={"temperature": 1.0})),
        key(requested(PLAIN, params={"temperature": True})),
        key(requested(PLAIN, params={"temperature": math.nan})),
        key(requested(PLAIN, params={"temperature": math.inf})),
        key(requested(PLAIN, params={"temperature": "NaN"})),
        key(requested(PLAIN, rollout_id=1)),
        key(requested(PLAIN, rollout_id="1")),
        key(requested(PLAIN, params={"rollout_id": 1})),
        key(requested(PLAIN), namespace="a"),
        key(requested(PLAIN), namespace=""),
        key(requested(PLAIN, params={"api_key": "a"})),
        key(requested(PLAIN, params={"api_key": "b"})),
        key(requested(PLAIN, params={"extra_headers": {"a": "b"}})),
        key(requested(PLAIN, params={"headers": {"a": "b"}})),
        key(requested(PLAIN, params={"api_base": "http://u:p@a/v1"})),
        key(requested(PLAIN, params={"api_base": "http://u:q@a/v1"})),
        key(requested(PLAIN, params={"extra_body": {"api_base": "http://a/v1"}})),
    ]
    assert len(set(made)) == len(made)
    with_key = {"api_key": "a"}
    assert key(requested(PLAIN, params=with_key), namespace="n") == key(
        requested(PLAIN), namespace="n"
    )
    ends = [key(requested(PLAIN, params={"eos_token": end}), namespace="n") for end in "ab"]
    assert ends[0] != ends[1]  # a secret's name alone, and another answer
    monkeypatch.setenv("OPENAI_API_BASE", "http://a/v1/")
    assert key(requested(PLAIN)) == key(requested(PLAIN, params={"base_url": "http://a/v1"}))


@pytest.mark.parametrize(
    ("model", "variable"),
    [
        ("openai/m", "OPENAI_API_BASE"),
        ("gpt-4o-mini", "OPENAI_API_BASE"),
        ("hosted_vllm/m", "HOSTED_VLLM_API_BASE"),
        ("azure/m", "AZURE_API_BASE"),
    ],
)
def test_an_endpoint_of_the_environment_counts(
    model: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever points a program at another server must get that server's answers (B 5.3)."""
    monkeypatch.delenv(variable, raising=False)
    before = endpoint_text(model, {})
    monkeypatch.setenv(variable, "http://there/v1/")
    assert endpoint_text(model, {}) == "http://there/v1" != before
    assert endpoint_text(model, {"api_base": "http://here"}) == "http://here"
    assert endpoint_text("bare", {}) == "bare"


class City(BaseModel):
    name: str


class Town(BaseModel):
    name: str


def test_pydantic_models_are_told_apart_by_name_and_schema() -> None:
    """`response_format` may be a class; one of the same form made anew is the same (B 5.3)."""

    def local(kind: type) -> type[BaseModel]:
        class Local(BaseModel):
            __annotations__ = {"name": kind}

        return Local

    formats = [City, Town, local(str), local(int), City(name="a"), City(name="b"), {"name": "a"}]
    made = [key_of({"response_format": each}) for each in formats]
    assert len(set(made)) == len(made)
    assert key_of({"response_format": local(str)}) == made[2]
    assert key_of({"response_format": City(name="a")}) == made[4]


# --- what has no key -----------------------------------------------------------------------------

CYCLIC: list[Any] = []
CYCLIC.append({"me": CYCLIC})
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


class Unwritable(BaseModel):
    anything: Any = None


SELFISH = Unwritable()
SELFISH.anything = SELFISH


@pytest.mark.parametrize(
    "value",
    [len, object(), {1, 2}, b"bytes", CYCLIC, DEEP, SELFISH, Unwritable(anything=len), {("a",): 1}],
    ids=["function", "object", "set", "bytes", "cyclic", "deep", "model", "content", "names"],
)
def test_what_has_no_form_in_json_has_no_key(value: Any) -> None:
    """Its `repr` may hold an address, and another process would not find it."""
    with pytest.raises(TypeError):
        key_of({"value": value})
    cache = dspy.Cache(enable_disk_cache=False)
    assert cache.get({"value": value}) is None
    request = requested(PLAIN, params={"value": value})
    assert Cached("chat").key(request, cache) is None


def test_a_key_function_that_fails_leaves_the_call_without_a_key() -> None:
    """The engine asks it again, and says what is wrong."""

    def fail() -> str:
        raise OSError("the vault is closed")

    cache = dspy.Cache(enable_disk_cache=False)
    assert Cached("chat").key(requested(PLAIN, params={"api_key": fail}), cache) is None


def test_ignored_names_are_no_part_of_the_key() -> None:
    """DSPy's way to leave something out."""
    cache = dspy.Cache(enable_disk_cache=False)
    plain = cache.cache_key({"a": 1})
    assert cache.cache_key({"a": 1, "b": object()}, ["b"]) == plain
    assert cache.cache_key({"a": 1, "b": 2}, ["c"]) != plain
    assert len(plain) == 64
    assert key_of({"a": 1}) == plain


# --- secrets -------------------------------------------------------------------------------------

SECRETS = st.text("abcdefghijklmnop0123456789", min_size=12, max_size=20)


@given(
    SECRETS,
    st.sampled_from(
        [
            lambda secret: {"api_key": secret},
            lambda secret: {"api_key": lambda: secret},
            lambda secret: {"headers": {"x-api-key": secret}},
            lambda secret: {"extra_headers": {"Authorization": f"Bearer {secret}"}},
            lambda secret: {"aws_secret_access_key": secret, "aws_session_token": secret},
            lambda secret: {"vertex_credentials": {"private_key": secret}},
            lambda secret: {"azure_ad_token": secret},
            lambda secret: {"api_base": f"https://user:{secret}@host/v1"},
            lambda secret: {"base_url": f"https://{secret}@host/v1"},
        ]
    ),
)
def test_no_secret_is_in_what_a_key_is_made_from(secret: str, params_of: Any) -> None:
    """It is told by a fingerprint, whose salt is this cache's own (B 5.3)."""
    request = requested(PLAIN, params=params_of(secret))
    told = {
        salt: describe(request, kind="chat", namespace=None, salt=lambda salt=salt: salt)
        for salt in (SALT, b"t" * 32)
    }
    for described in told.values():
        assert secret not in repr(described)
    assert key_of(told[SALT]) != key_of(told[b"t" * 32])
    named = describe(request, kind="chat", namespace="n", salt=lambda: SALT)
    assert secret not in repr(named)


@given(SECRETS, SECRETS)
def test_fingerprints_tell_secrets_apart(first: str, second: str) -> None:
    """Two tenants are never one; nobody can try keys against a fingerprint without the salt."""
    assert (fingerprint({"k": first}, SALT) == fingerprint({"k": second}, SALT)) == (
        first == second
    )
    assert fingerprint({"k": first}, SALT) != fingerprint({"k": first}, b"t" * 32)
    assert fingerprint({"a": first}, SALT) != fingerprint({"b": first}, SALT)
