"""DSPy's names: each is here, under its path, and takes DSPy's calls.

What the calls do is tested with the things themselves. Not here: the modules behind the deeper
paths (`test_dspy_paths.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

import dspylite as dspy
from dspylite.dspy_paths import ABSENT

# DSPy 3.4.1's public calls; a 0 stands for a default. Parameters that its programs do not pass by
# position are keywords here. `Signature(...)` is tested in `test_signature.py`.
TOP_LEVEL = """
AdapterParseError(adapter_name, signature, lm_response, message=0, parsed_result=0)
Audio(*, data, audio_format)
BaseLM(model, model_type=0, temperature=0, max_tokens=0, cache=0, callbacks=0, num_retries=0)
BestOfN(module, N, reward_fn, threshold, fail_count=0)
ChainOfThought(signature, rationale_field=0, rationale_field_type=0, **config)
ChatAdapter(callbacks=0, use_native_function_calling=0, native_response_types=0, use_json_adapter_fallback=0, parallel_tool_calls=0)
Code(*, code)
Completions(list_or_dict, signature=0)
ContextWindowExceededError(*, model=0, message=0, **kwargs)
Embedder(model, batch_size=0, caching=0, **kwargs)
Embeddings(corpus, embedder, k=0, callbacks=0, cache=0, brute_force_threshold=0, normalize=0)
EmbeddingsWithScores(corpus, embedder, k=0, callbacks=0, cache=0, brute_force_threshold=0, normalize=0)
Evaluate(*, devset, metric=0, num_threads=0, display_progress=0, display_table=0, max_errors=0, provide_traceback=0, failure_score=0, save_as_csv=0, save_as_json=0)
Example(base=0, **kwargs)
File(*, file_data=0, file_id=0, filename=0)
History(*, messages)
Image(source=0, /, *, download=0, verify=0)
InputField(**kwargs)
JSONAdapter(callbacks=0, use_native_function_calling=0, parallel_tool_calls=0)
KNN(k, trainset, vectorizer)
LM(model, model_type=0, temperature=0, max_tokens=0, cache=0, callbacks=0, num_retries=0, *, provider=0, finetuning_model=0, launch_kwargs=0, train_kwargs=0, use_developer_role=0, engine=0, async_engine=0, prompt_cache=0, **kwargs)
Module(callbacks=0)
MultiChainComparison(signature, M=0, temperature=0, **config)
OutputField(**kwargs)
Parallel(num_threads=0, max_errors=0, access_examples=0, return_failed_examples=0, provide_traceback=0, disable_progress_bar=0, timeout=0, straggler_limit=0)
Predict(signature, callbacks=0, **config)
Prediction(*args, **kwargs)
ReAct(signature, tools, max_iters=0)
ReActV2(signature, tools, max_iters=0)
Reasoning(*, content)
Refine(module, N, reward_fn, threshold, fail_count=0)
Tool(func, name=0, desc=0, args=0, arg_types=0, arg_desc=0)
ToolCallResults(*, tool_call_results)
ToolCalls(*, tool_calls)
TwoStepAdapter(extraction_model, **kwargs)
Type()
XMLAdapter(callbacks=0, use_native_function_calling=0, native_response_types=0, use_json_adapter_fallback=0, parallel_tool_calls=0)
asyncify(program)
configure(**kwargs)
configure_cache(enable_disk_cache=0, enable_memory_cache=0, disk_cache_dir=0, disk_size_limit_bytes=0, memory_max_entries=0, restrict_pickle=0, safe_types=0)
context(**kwargs)
infer_prefix(attribute_name)
inspect_history(n=0, file=0)
is_retryable_lm_error(error)
load(path, allow_pickle=0)
load_settings(path, allow_pickle=0)
majority(prediction_or_completions, normalize=0, field=0)
make_signature(signature, instructions=0, signature_name=0, custom_types=0)
streamify(program, status_message_provider=0, stream_listeners=0, include_final_prediction_in_output_stream=0, is_async_program=0, async_streaming=0)
syncify(program, in_place=0)
track_usage()
"""

BELOW = """
Audio.from_file(file_path)
Audio.from_path(file_path)
Audio.from_url(url, verify=0, timeout=0)
BaseLM.load_state(state, *, allow_custom_lm_class=0)
Code.description()
File.from_bytes(file_bytes, filename=0, mime_type=0)
File.from_file_id(file_id, filename=0)
File.from_path(file_path, filename=0, mime_type=0)
History.model_validate(obj)
Image.from_PIL(pil_image)
Image.from_file(file_path)
Image.from_path(file_path)
Image.from_url(url, verify=0, timeout=0)
LM.load_state(state, *, allow_custom_lm_class=0)
ToolCallResults.ToolCallResult(*, call_id=0, name, value, is_error=0)
ToolCallResults.from_tool_calls_and_values(tool_calls, values, is_errors=0)
ToolCalls.ToolCall(*, id=0, name, args)
ToolCalls.description()
ToolCalls.from_dict_list(tool_calls_dicts)
Type.extract_custom_type_from_annotation(annotation)
adapters.baml_adapter.BAMLAdapter(callbacks=0, use_native_function_calling=0, parallel_tool_calls=0)
adapters.types.tool.ToolCallResults.from_tool_calls_and_values(tool_calls, values, is_errors=0)
adapters.types.tool.ToolCalls.ToolCall(*, id=0, name, args)
adapters.types.tool.ToolCalls.from_dict_list(tool_calls_dicts)
adapters.types.tool.ToolCalls.model_validate(obj)
cache.get(request, ignored_args_for_cache_key=0)
cache.put(request, value, ignored_args_for_cache_key=0, enable_memory_cache=0)
cache.reset_memory_cache()
clients.cache.Cache(enable_disk_cache, enable_memory_cache, disk_cache_dir, disk_size_limit_bytes=0, memory_max_entries=0, restrict_pickle=0, safe_types=0)
clients.cache.request_cache(cache_arg_name=0, ignored_args_for_cache_key=0, enable_memory_cache=0, *, maxsize=0)
evaluate.auto_evaluation.CompleteAndGrounded(threshold=0)
evaluate.auto_evaluation.SemanticF1(threshold=0, decompositional=0)
evaluate.evaluate.EvaluationResult(score, results)
evaluate.metrics.answer_exact_match(example, pred, trace=0, frac=0)
evaluate.normalize_text(s)
experimental.Citations(*, citations)
experimental.Citations.Citation(*, cited_text, document_index, start_char_index, end_char_index, document_title=0, supported_text=0)
experimental.Citations.from_dict_list(citations_dicts)
experimental.Document(*, data, title=0, media_type=0, context=0)
primitives.prediction.Prediction.from_completions(list_or_dict, signature=0)
retrievers.embeddings.Embeddings.from_saved(path, embedder)
retrievers.embeddings.EmbeddingsWithScores.from_saved(path, embedder)
settings.configure(**kwargs)
settings.copy()
settings.save(path, modules_to_serialize=0, exclude_keys=0)
streaming.StatusMessage(message)
streaming.StatusMessageProvider()
streaming.StreamListener(signature_field_name, predict=0, predict_name=0, allow_reuse=0)
streaming.StreamResponse(predict_name, signature_field_name, chunk, is_last_chunk)
streaming.apply_sync_streaming(async_generator)
streaming.streaming_response(streamer)
utils.DummyLM(answers, follow_examples=0, reasoning=0, adapter=0)
utils.DummyVectorizer(max_length=0, n_gram=0)
utils.callback.ACTIVE_CALL_ID.get()
utils.callback.BaseCallback()
utils.callback.with_callbacks(fn)
utils.inspect_history.pretty_print_history(history, n=0, file=0)
utils.unbatchify.Unbatchify(batch_fn, max_batch_size=0, max_wait_time=0)
utils.parallelizer.ParallelExecutor(num_threads=0, max_errors=0, disable_progress_bar=0, provide_traceback=0, compare_results=0, timeout=0, straggler_limit=0)
utils.usage_tracker.UsageTracker()
"""

ALSO_IMPORTED_AS = """
adapters.types.Type adapters.types.tool.Tool adapters.types.tool.ToolCallResults
adapters.types.tool.ToolCalls adapters.xml_adapter.XMLAdapter clients.configure_cache
clients.embedding.Embedder evaluate.evaluate.Evaluate predict.KNN predict.Predict
predict.aggregation.majority predict.best_of_n.BestOfN predict.predict.Predict
predict.refine.Refine primitives.example.Example primitives.module.Module
primitives.prediction.Completions primitives.prediction.Prediction
retrievers.embeddings.Embeddings retrievers.embeddings.EmbeddingsWithScores
utils.exceptions.AdapterParseError utils.exceptions.ContextWindowExceededError
utils.usage_tracker.track_usage
"""

VALUES = """
adapters.baml_adapter.COMMENT_SYMBOL adapters.baml_adapter.INDENTATION cache cache.memory_cache
clients.base_lm.GLOBAL_HISTORY clients.base_lm.LM_CLASS_STATE_KEY settings settings.adapter
settings.callbacks settings.lm settings.send_stream settings.trace settings.track_usage
settings.usage_tracker utils.callback.ACTIVE_CALL_ID
"""

SETTINGS = """
lm adapter callbacks trace track_usage usage_tracker disable_history max_history_size max_trace_size
warn_on_type_mismatch async_max_workers allow_tool_async_sync_conversion send_stream experimental
num_threads max_errors provide_traceback
"""

ERRORS = """
LMAuthError LMConfigurationError LMError LMInvalidRequestError LMRateLimitError
LMServerError LMTimeoutError LMTransportError LMUnexpectedError
"""

MEMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "Example": (
        lambda: dspy.Example(a=1).with_inputs("a"),
        "inputs labels with_inputs without copy get items keys values toDict "
        "__getitem__ __eq__ __hash__ __len__ a",
    ),
    "Prediction": (
        lambda: dspy.Prediction(score=1, a=2),
        "completions get_lm_usage from_completions a __add__ __radd__ __sub__ __mul__ __truediv__ "
        "__lt__ __le__ __gt__ __ge__ __float__",
    ),
    "Module": (
        lambda: _without_init()(),
        "__call__ acall batch named_predictors predictors named_parameters named_sub_modules "
        "parameters set_lm get_lm map_named_predictors deepcopy reset_copy save load dump_state "
        "load_state inspect_history history callbacks",
    ),
    "Signature": (
        lambda: dspy.Signature("a, b: int -> c"),
        "append prepend insert delete with_instructions append_instructions with_updated_fields "
        "equals dump_state load_state fields input_fields output_fields instructions signature",
    ),
    "LM": (
        lambda: dspy.LM("openai/m"),
        "__call__ acall forward aforward copy dump_state load_state inspect_history history kwargs "
        "model model_type cache callbacks num_retries use_developer_role",
    ),
    "Adapter": (
        dspy.ChatAdapter,
        "format parse format_field_structure format_user_message_content __call__ acall",
    ),
    "Tool": (
        lambda: dspy.Tool(size_of, name="size"),
        "__call__ acall format_as_litellm_function_call from_langchain from_mcp_tool name desc "
        "args func",
    ),
    "Predict": (
        lambda: dspy.Predict("a -> b"),
        "signature demos lm traces train config history",
    ),
    "ChainOfThought": (lambda: dspy.ChainOfThought("a -> b"), "predict"),
    "ReAct": (lambda: _top("ReAct")("a -> b", [size_of]), "react extract tools"),
    "ToolCalls": (lambda: dspy.ToolCalls.from_dict_list([]), "tool_calls"),
    "ToolCall": (lambda: dspy.ToolCalls.ToolCall(name="n", args={}), "name args id"),
    "ToolCallResults": (
        lambda: dspy.ToolCallResults(tool_call_results=[]),
        "tool_call_results",
    ),
    "ToolCallResult": (
        lambda: dspy.ToolCallResults.ToolCallResult(call_id="c", name="n", value=1, is_error=False),
        "call_id name value is_error",
    ),
    "Image": (lambda: dspy.Image(url="data:image/png;base64,iVBORw0KGgo="), "url"),
    "Audio": (lambda: dspy.Audio(data="UklGRg==", audio_format="wav"), "data audio_format"),
    "File": (lambda: dspy.File(file_id="f"), "file_data file_id filename"),
    "Code": (lambda: dspy.Code(code="x = 1"), "code language"),
    "History": (lambda: dspy.History(messages=[]), "messages"),
    "Cache": (
        lambda: dspy.Cache(enable_disk_cache=False),
        "memory_cache disk_cache disk_cache_dir enable_disk_cache get put reset_memory_cache",
    ),
    "ParallelExecutor": (
        lambda: found("utils.parallelizer.ParallelExecutor")(),
        "failed_indices exceptions_map execute",
    ),
    "Unbatchify": (
        lambda: dspy.Unbatchify(list),
        "batch_fn max_batch_size max_wait_time close __call__ __enter__ __exit__",
    ),
    "Parallel": (dspy.Parallel, "timeout straggler_limit"),
    "Evaluate": (
        lambda: dspy.Evaluate(devset=[dspy.Example(a=1).with_inputs("a")], metric=max),
        "devset metric num_threads display_progress",
    ),
    "Embeddings": (
        lambda: dspy.Embeddings(["a", "b"], dspy.Embedder("offline/hashing")),
        "corpus k normalize embedder index",
    ),
    "EmbeddingsWithScores": (
        lambda: dspy.EmbeddingsWithScores(["a", "b"], dspy.Embedder("offline/hashing"), k=1)("a"),
        "passages indices scores",
    ),
    "StreamResponse": (
        lambda: found("streaming.StreamResponse")("p", "f", "c", True),
        "predict_name signature_field_name chunk is_last_chunk",
    ),
    "StatusMessage": (lambda: found("streaming.StatusMessage")("m"), "message"),
    "UsageTracker": (lambda: found("utils.usage_tracker.UsageTracker")(), "usage_data"),
    "LMError": (
        lambda: dspy.LMError("m", code="c", model="m", provider="p", status=500),
        "code message model provider status request_id retry_after",
    ),
    "AdapterParseError": (
        lambda: dspy.AdapterParseError("A", dspy.Signature("a -> b"), "r", "m", {}),
        "adapter_name signature lm_response parsed_result",
    ),
}


def calls(table: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.]+)(\(.*\))$", table, flags=re.MULTILINE))


def size_of(text: str) -> int:
    """Give the length of a text."""
    return len(text)


def _top(name: str) -> Any:
    return getattr(dspy, name)


def _without_init() -> type[dspy.Module]:
    class Program(dspy.Module):
        def __init__(self) -> None:
            self.step = dspy.Predict("a -> b")

    return Program


def found(path: str) -> Any:
    """Follow DSPy's path from the package, through modules and attributes."""
    thing: Any = dspy
    for name in path.split("."):
        try:
            thing = getattr(thing, name)
        except AttributeError:
            if not inspect.ismodule(thing):
                raise
            thing = importlib.import_module(f"{thing.__name__}.{name}")
    return thing


def signature_of(thing: Any) -> inspect.Signature:
    if inspect.isclass(thing) and issubclass(thing, pydantic.BaseModel | dspy.Module):
        # Where `inspect` looks instead, one takes anything and the other is too strict.
        return inspect.signature(functools.partial(thing.__init__, None))
    return inspect.signature(thing)


def exists(path: str) -> bool:
    try:
        found(path)
    except (AttributeError, ImportError):
        return False
    return True


CALLS = {**calls(TOP_LEVEL), **calls(BELOW)}


@pytest.mark.parametrize("name", CALLS)
def test_name_takes_dspys_calls(name: str) -> None:
    """By position in DSPy's order, by keyword, and with what has no default alone."""
    scope: dict[str, Any] = {}
    exec(f"def documented{CALLS[name]}: ...", scope)
    documented = inspect.signature(scope["documented"]).parameters.values()
    thing = found(name)
    assert callable(thing)
    ours = signature_of(thing)
    named = [p for p in documented if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
    by_place = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    keywords = {p.name: 0 for p in named if p.name not in by_place}
    only_by_place = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]
    either = {p.name: 0 for p in named if p.name in by_place and p.name not in only_by_place}
    needed = {p.name: 0 for p in named if p.default is p.empty}

    bound = ours.bind(*by_place, **keywords).arguments
    assert [bound.get(each, each) for each in by_place] == by_place  # and not one for another
    ours.bind(*only_by_place, **either, **keywords)
    ours.bind(**needed)
    if any(p.kind is p.VAR_KEYWORD for p in documented):
        ours.bind(**needed, something_else=1)


@pytest.mark.parametrize("name", [*ALSO_IMPORTED_AS.split(), *VALUES.split()])
def test_name_is_there_under_dspys_path(name: str) -> None:
    """Programs import from deep inside DSPy; what they get is the one thing of that name."""
    thing, last = found(name), name.rpartition(".")[2]
    if name in ALSO_IMPORTED_AS.split():
        assert thing is getattr(dspy, last)


@pytest.mark.parametrize("owner", MEMBERS)
def test_attributes_and_methods_are_there(owner: str) -> None:
    """What programs read, set and call on what they hold."""
    make, names = MEMBERS[owner]
    thing = make()
    for name in names.split():
        assert hasattr(thing, name), name


@pytest.mark.parametrize("name", SETTINGS.split())
def test_setting_is_there(name: str) -> None:
    """A program's `configure` and `context` name them."""
    assert name in dspy.settings


@pytest.mark.parametrize("name", ERRORS.split())
def test_error_takes_dspys_arguments_and_survives_pickle(name: str) -> None:
    """Tests and adapters of users make such errors themselves."""
    details: dict[str, Any] = {
        "code": "c",
        "model": "m",
        "provider": "p",
        "provider_code": "x",
        "status": 500,
        "request_id": "r",
        "retry_after": 1.5,
    }
    error = pickle.loads(pickle.dumps(_top(name)("said", **details)))
    assert {key: getattr(error, key) for key in details} == details
    assert error.message == "said"


def test_every_error_has_what_handlers_of_dspys_read() -> None:
    """`except DSPyError as error` logs a code and a message, whatever it was."""
    error = dspy.SettingsError("No such setting.")
    assert (error.message, error.code, error.model, error.status) == (str(error), None, None, None)


# --- The page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "coming-from-dspy.md"
_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`")


def named_on_the_page() -> Iterator[tuple[str, str]]:
    """Give each name in the first column of a table, with the heading that it stands under."""
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| `"):
            for name in _NAME.findall(line.split(" | ")[0]):
                yield name, heading


ON_THE_PAGE = list(dict.fromkeys(named_on_the_page()))


@pytest.mark.parametrize(("name", "heading"), ON_THE_PAGE)
def test_name_on_the_page_is_here_or_said_to_be_absent(name: str, heading: str) -> None:
    """A page that promises what is not there sends its reader astray."""
    if heading == "What is not here":
        assert not exists(name)
        assert name in " ".join(ABSENT.values()).split()
    else:
        assert exists(name)


def test_page_tells_of_every_name_of_the_top_level() -> None:
    """What is looked for and not found is taken for missing."""
    told = {name.rpartition(".")[2] for name, _ in ON_THE_PAGE}
    assert set(calls(TOP_LEVEL)) - told == set()
