"""What calls are named and described as in traces, by the semantic conventions for generative AI.

Source: https://github.com/open-telemetry/semantic-conventions-genai; names of our own begin with
`dspylite.`. Not here: the spans themselves (`integrations/opentelemetry.py`).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from dspylite.models.direct.providers import provider_of
from dspylite.runtime.frames import current_call
from dspylite.schema.messages import LMOutput, LMResponse, Usage
from dspylite.schema.secrets import is_secret

Attributes = dict[str, Any]

TOKEN_BUCKETS = [4**power for power in range(14)]
SECONDS_BUCKETS = [0.01 * 2**power for power in range(14)]
"""Bucket boundaries that the conventions recommend."""

_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
"""Providers that the conventions spell otherwise than litellm."""

_PARAMS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}
_PLAIN_METHODS = frozenset({"__call__", "acall", "forward", "aforward"})
_MOST_ITEMS = 200  # of one list or dict that are written; a guess at what anybody would read


# --- What attributes are made of -----------------------------------------------------------------


def name_of(instance: Any) -> str:
    """Name the span of a module: its class, and the method where that is not the usual one."""
    name, frame = type(instance).__name__, current_call()
    method = None if frame is None else frame.method
    return name if method is None or method in _PLAIN_METHODS else f"{name}.{method}"


def error_type(error: BaseException) -> str:
    """Name a failure; few names, so that they can be grouped by."""
    cls = type(error)
    short = cls.__module__ == "builtins" or cls.__module__.startswith("dspylite.")
    return cls.__qualname__ if short else f"{cls.__module__}.{cls.__qualname__}"


def provider_and_model(instance: Any) -> tuple[str, str]:
    """Split a model's name into who serves it and what is served."""
    name = str(getattr(instance, "model", None) or type(instance).__name__)
    provider, slash, model = name.partition("/")
    if not slash:
        known = provider_of(name)
        return (type(instance).__name__.lower() if known is None else known.name), name
    return _PROVIDERS.get(provider, provider), model


def server_of(instance: Any, params: Mapping[str, Any]) -> Attributes:
    """Give host and port of a model's endpoint, as far as they are known."""
    url = params.get("api_base") or params.get("base_url")
    provider = provider_of(str(getattr(instance, "model", "")))
    if not url and provider is not None and getattr(instance, "is_remote", False):
        named = (os.environ.get(name) for name in provider.base_variables)
        url = next(filter(None, named), None) or provider.default_base
    return dict(_address(url)) if isinstance(url, str) else {}


@functools.lru_cache(maxsize=256)
def _address(url: str) -> tuple[tuple[str, Any], ...]:
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return ()
    if not host:
        return ()
    port = port or (80 if parts.scheme == "http" else 443)
    return (("server.address", host), ("server.port", port))


def request_attributes(params: Mapping[str, Any]) -> Attributes:
    """Give what was asked for, prompts and secrets excepted."""
    found: Attributes = {
        f"gen_ai.request.{name}": params[param]
        for param, name in _PARAMS.items()
        if isinstance(params.get(param), int | float)
    }
    stop, count = params.get("stop"), params.get("n")
    if isinstance(stop, str):
        found["gen_ai.request.stop_sequences"] = [stop]
    elif isinstance(stop, list | tuple):
        found["gen_ai.request.stop_sequences"] = [str(each) for each in _listed(stop)]
    if isinstance(count, int) and count != 1:
        found["gen_ai.request.choice.count"] = count
    if wanted := params.get("response_format"):
        is_text = isinstance(wanted, Mapping) and wanted.get("type") == "text"
        found["gen_ai.output.type"] = "text" if is_text else "json"
    return found


def usage_attributes(usage: Usage) -> Attributes:
    """Give the tokens of an answer."""
    found: Attributes = {}
    if usage.prompt_tokens or usage.completion_tokens:
        found["gen_ai.usage.input_tokens"] = usage.prompt_tokens
        found["gen_ai.usage.output_tokens"] = usage.completion_tokens
    if cached := usage.details.get("cached_tokens"):
        found["gen_ai.usage.cache_read.input_tokens"] = cached
    if reasoned := usage.details.get("reasoning_tokens"):
        found["gen_ai.usage.reasoning.output_tokens"] = reasoned
    return found


# --- Content, where it is wanted -----------------------------------------------------------------

Part = dict[str, Any]


def _listed(value: Any) -> list[Any]:
    return list(cast("Iterable[Any]", value)) if isinstance(value, list | tuple) else []


def _input_parts(message: Mapping[str, Any]) -> list[Part]:
    content = message.get("content")
    parts = _content_parts(content)
    if message.get("role") == "tool":
        response = parts if isinstance(content, list | tuple) else content
        return [
            {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": response}
        ]
    return parts + _tool_parts(message.get("tool_calls"))


def _content_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    parts: list[Part] = []
    for piece in _listed(content):
        kind = str(piece.get("type")) if isinstance(piece, Mapping) else "text"
        # Pictures and files are named and not copied.
        parts.append(
            {"type": "text", "content": piece["text"]} if kind == "text" else {"type": kind}
        )
    return parts


def _output_parts(output: LMOutput) -> list[Part]:
    parts: list[Part] = []
    if output.reasoning:
        parts.append({"type": "reasoning", "content": output.reasoning})
    if output.text:
        parts.append({"type": "text", "content": output.text})
    return parts + _tool_parts(output.tool_calls)


def _tool_parts(calls: Any) -> list[Part]:
    parts: list[Part] = []
    for call in _listed(calls):
        function = call.get("function", {})
        parts.append(
            {
                "type": "tool_call",
                "id": call.get("id"),
                "name": function.get("name"),
                "arguments": function.get("arguments"),
            }
        )
    return parts


def written_input(inputs: Mapping[str, Any], limit: int) -> str:
    """Write the messages of a request, cut to about `limit` characters."""
    messages = _listed(inputs.get("messages"))
    if not messages:
        messages = [{"role": "user", "content": inputs.get("prompt")}]
    return _as_json(
        [{"role": str(each.get("role")), "parts": _input_parts(each)} for each in messages], limit
    )


def written_output(response: LMResponse, limit: int) -> str:
    """Write the answers of a model, cut to about `limit` characters."""
    return _as_json(
        [
            {
                "role": "assistant",
                "parts": _output_parts(each),
                "finish_reason": each.finish_reason or "stop",
            }
            for each in response.outputs
        ],
        limit,
    )


def written(value: Any, limit: int) -> str:
    """Write a value as JSON, without what is secret by its name, cut to `limit` characters."""
    return clipped(json.dumps(_plain(value, [limit]), ensure_ascii=False, default=str), limit)


def _as_json(messages: Sequence[dict[str, Any]], limit: int) -> str:
    """Write messages; if not all have room, the last ones are kept."""
    kept: list[dict[str, Any]] = []
    left = [limit]
    for message in reversed(messages):
        if left[0] <= 0:
            break
        left[0] -= len(message["role"])
        kept.append({**message, "parts": _cut_parts(message["parts"], left)})
    return _encodable(json.dumps(kept[::-1], ensure_ascii=False, default=str))


def _cut_parts(parts: Sequence[Part], left: list[int]) -> list[Part]:
    """Cut the texts of parts to what room is left, and leave out those for which there is none."""
    kept: list[Part] = []
    for part in parts:
        if left[0] <= 0:
            break
        left[0] -= len(part["type"])
        kept.append({name: _cut(value, left) for name, value in part.items()})
    return kept


def _cut(value: Any, left: list[int]) -> Any:
    if isinstance(value, list):
        return _cut_parts(cast("Sequence[Part]", value), left)
    if value is None:
        return None
    if isinstance(value, str):
        text = value
    else:  # arguments that are no text yet
        room = max(left[0], 1)
        text = json.dumps(_plain(value, [room]), ensure_ascii=False, default=str)
        if len(text) <= room:
            left[0] -= len(text)
            return _plain(value, [room])
    room = max(left[0], 0)
    left[0] -= len(text)
    return clipped(text, room)


def clipped(text: str, limit: int) -> str:
    """Cut a text, and say so."""
    return _encodable(text if len(text) <= limit else f"{text[:limit]}…")


def _encodable(text: str) -> str:
    """Replace lone surrogates, with which no exporter could send the span."""
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any, left: list[int], depth: int = 6) -> Any:
    """Give a value as JSON knows it, without what is secret by its name and beyond bounds.

    Args:
        value: Anything; objects with fields are written as dicts of them.
        left: How many characters there is room for; counted down, so that what holds itself ends.
        depth: How deep to look.
    """
    left[0] -= 1
    if value is None or isinstance(value, int | float | bool):
        return value
    if left[0] < 0:
        return "…"
    if isinstance(value, str):
        return _taken(value, left)
    pairs = _pairs(value)
    if pairs is None and not isinstance(value, list | tuple):
        return _taken(str(value), left)
    if not depth:
        return "…"
    if pairs is not None:
        return {
            str(name): _plain(each, left, depth - 1)
            for name, each in itertools.islice(pairs, _MOST_ITEMS)
            if not is_secret(str(name))
        }
    some = cast("Sequence[Any]", value)[:_MOST_ITEMS]
    return [_plain(each, left, depth - 1) for each in some]


def _taken(text: str, left: list[int]) -> str:
    found = text[: left[0] + 2]  # one more, so that the end sees that something is missing
    left[0] -= len(found)
    return found


def _pairs(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Give what a value holds by name; None if it holds nothing by name."""
    if isinstance(value, type):
        return None
    items = getattr(value, "items", None)
    if callable(items):
        return cast("Iterable[tuple[Any, Any]]", items())
    named = getattr(type(value), "model_fields", None)  # of pydantic
    if not isinstance(named, Mapping):
        named = getattr(value, "__dataclass_fields__", None)
    if not isinstance(named, Mapping):
        return None
    names = cast("Iterable[str]", named)
    return ((name, getattr(value, name, None)) for name in names)
