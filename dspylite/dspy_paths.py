"""DSPy's deeper module paths, such as `dspylite.utils.callback`, as doors to our own names.

`from dspylite.utils.callback import BaseCallback` works, though no file of that name exists: the
table below says which names each path has, and `install` makes a module of each. A real module of
the same path stays and gets what it lacks. Names are looked up on their first use, so that a path
costs nothing. Not here: the top level itself, which is the public list (`__init__.py`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

_TYPES = "Type History Image Audio File Code Reasoning Tool ToolCalls ToolCallResults"
_ADAPTERS = "Adapter ChatAdapter JSONAdapter XMLAdapter TwoStepAdapter"
_SIGNATURES = "Signature make_signature ensure_signature infer_prefix"
_PROGRAMS = (
    "majority BestOfN ChainOfThought KNN MultiChainComparison Predict ReAct ReActV2 Refine Tool "
    "Parallel"
)
_METRICS = "EM normalize_text answer_exact_match answer_passage_match"
_SCORES = "F1 HotPotF1 em_score f1_score hotpot_f1_score precision_score"
_JUDGES = "SemanticF1 CompleteAndGrounded"
_JUDGED = (
    "AnswerCompleteness AnswerGroundedness DecompositionalSemanticRecallPrecision "
    "SemanticRecallPrecision"
)
_STREAMS = "StatusMessage StatusMessageProvider"

PATHS: Mapping[str, str] = MappingProxyType(
    {
        "adapters": f"{_ADAPTERS} BAMLAdapter {_TYPES}",
        "adapters.baml_adapter": "BAMLAdapter COMMENT_SYMBOL INDENTATION",
        "adapters.chat_adapter": "ChatAdapter",
        "adapters.json_adapter": "JSONAdapter",
        "adapters.two_step_adapter": "TwoStepAdapter",
        "adapters.types": f"{_TYPES} Citations Document",
        "adapters.types.base_type": "Type",
        "adapters.types.citation": "Citations",
        "adapters.types.code": "Code",
        "adapters.types.document": "Document",
        "adapters.types.reasoning": "Reasoning",
        "adapters.types.tool": "Tool ToolCalls ToolCallResults",
        "adapters.xml_adapter": "XMLAdapter",
        "clients": "BaseLM LM Embedder Cache configure_cache inspect_history",
        "clients.base_lm": "BaseLM GLOBAL_HISTORY LM_CLASS_STATE_KEY inspect_history",
        "clients.cache": "Cache request_cache",
        "clients.embedding": "Embedder",
        "clients.lm": "LM",
        "evaluate": f"Evaluate EvaluationResult {_METRICS} {_JUDGES}",
        "evaluate.auto_evaluation": f"{_JUDGES} {_JUDGED}",
        "evaluate.evaluate": "Evaluate EvaluationResult",
        "evaluate.metrics": f"{_METRICS} {_SCORES}",
        "experimental": "Citations Document",
        "predict": _PROGRAMS,
        "predict.aggregation": "majority",
        "predict.best_of_n": "BestOfN",
        "predict.chain_of_thought": "ChainOfThought",
        "predict.knn": "KNN",
        "predict.multi_chain_comparison": "MultiChainComparison",
        "predict.parallel": "Parallel",
        "predict.predict": "Predict",
        "predict.react": "ReAct Tool",
        "predict.react_v2": "ReActV2",
        "predict.refine": "Refine",
        "primitives": "Example Module Prediction Completions",
        "primitives.example": "Example",
        "primitives.module": "Module",
        "primitives.prediction": "Prediction Completions",
        "retrievers": "Embeddings EmbeddingsWithScores",
        "retrievers.embeddings": "Embeddings EmbeddingsWithScores",
        "signatures": f"InputField OutputField {_SIGNATURES}",
        "signatures.field": "InputField OutputField",
        "signatures.signature": _SIGNATURES,
        "streaming": (
            f"{_STREAMS} StreamEvent StreamListener StreamResponse streamify apply_sync_streaming "
            "streaming_response"
        ),
        "streaming.messages": f"{_STREAMS} StreamResponse",
        "streaming.streamify": "streamify apply_sync_streaming streaming_response",
        "streaming.streaming_listener": "StreamListener",
        "utils": (
            "BaseCallback with_callbacks DummyLM DummyVectorizer pretty_print_history syncify "
            f"{_STREAMS}"
        ),
        "utils.asyncify": "asyncify",
        "utils.callback": "ACTIVE_CALL_ID BaseCallback with_callbacks",
        "utils.dummies": "DummyLM DummyVectorizer",
        "utils.exceptions": (
            "AdapterParseError ContextWindowExceededError DSPyError LMAuthError "
            "LMConfigurationError LMError LMInvalidRequestError LMNotConfiguredError "
            "LMRateLimitError LMServerError LMTimeoutError LMTransportError LMUnexpectedError "
            "is_retryable_lm_error"
        ),
        "utils.inspect_history": "pretty_print_history",
        "utils.parallelizer": "ParallelExecutor",
        "utils.saving": "load",
        "utils.syncify": "syncify",
        "utils.unbatchify": "Unbatchify",
        "utils.usage_tracker": "UsageTracker track_usage",
    }
)
"""Which names each of DSPy's modules has here; its other names are the package's own affair there.

Some are promised and not there yet: asking for one says so, and nothing else fails for it."""

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "ACTIVE_CALL_ID": "runtime.frames",
        "COMMENT_SYMBOL": "adapters.baml",
        "DummyLM": "testing",
        "DummyVectorizer": "testing",
        **dict.fromkeys(_JUDGED.split(), "programs.evaluation.judges"),
        **dict.fromkeys(("EM", *_SCORES.split()), "programs.evaluation.metrics"),
        "GLOBAL_HISTORY": "runtime.history",
        "INDENTATION": "adapters.baml",
        "LM_CLASS_STATE_KEY": "models.states:CLASS_KEY",
        "ParallelExecutor": "concurrency.parallel_executor",
        "StreamEvent": "programs.stream_events",
        "apply_sync_streaming": "programs.streaming",
        "ensure_signature": "schema.signature",
        "pretty_print_history": "runtime.inspection",
        "request_cache": "models.cache.remembered",
    }
)
"""Where names are that the top level does not have, and by what name if it is another.

The top level is asked first."""

ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "optimises programs, which dspylite only runs; compile with DSPy and load the state": (
            "AvatarOptimizer BetterTogether BootstrapFewShot BootstrapFewShotWithOptuna "
            "BootstrapFewShotWithRandomSearch BootstrapFinetune BootstrapRS COPRO Ensemble Flex "
            "GEPA InferRules KNNFewShot LabeledFewShot MIPROv2 SIMBA bootstrap_trace_data"
        ),
        "trains or starts models, which dspylite only calls; serve it and give LM its address": (
            "Provider TrainingJob"
        ),
        "runs code that a model wrote; give the model a Tool that runs it where you trust it to": (
            "CodeAct CodeExecutionError CodeInterpreter CodeInterpreterError FinalOutput "
            "LocalInterpreter ProgramOfThought PythonInterpreter RLM SandboxSerializable "
            "resolve_interpreter_factory"
        ),
        "asks a search server; call it from a function, or use Embeddings": "ColBERTv2 Retrieve",
        "has no class of its own here; catch LMError and read its code and status": (
            "LMBillingError LMCollectionLimitError LMLockTimeoutError LMProviderError "
            "LMStreamAssemblyError LMUnsupportedFeatureError LMUnsupportedModelError"
        ),
        "changes logging; use logging.getLogger('dspylite')": (
            "configure_dspy_loggers disable_litellm_logging disable_logging enable_litellm_logging "
            "enable_logging"
        ),
        "is a part of DSPy that does not run programs; import it from DSPy": (
            "datasets propose teleprompt"
        ),
        "is of an older form; use Module, InputField and OutputField": (
            "BaseModule OldField OldInputField OldOutputField"
        ),
    }
)
"""DSPy's names that are not here on purpose, by the reason and the remedy."""

_PAGE = "docs/how-to/coming-from-dspy.md says what each of DSPy's names is called here"


def install(face: ModuleType) -> None:
    """Make every path of the table importable below a package, and readable as its attribute.

    Args:
        face: The package's own module, whose names the paths lead to.
    """
    for path in sorted(PATHS):  # parents come before what is in them
        _module(face, path)


def missing(name: str) -> AttributeError:
    """Make the error for a name that the top level does not have."""
    for reason, names in ABSENT.items():
        if name in names.split():
            return AttributeError(f"DSPy's `{name}` is not part of dspylite: it {reason}.")
    return AttributeError(f"module 'dspylite' has no attribute {name!r}")


def _module(face: ModuleType, path: str) -> None:
    full = f"{face.__name__}.{path}"
    above, _, name = path.rpartition(".")
    parent = sys.modules[f"{face.__name__}.{above}"] if above else face
    module = sys.modules.get(full)
    if module is None and getattr(parent, "__path__", None) and find_spec(full) is not None:
        module = importlib.import_module(full)
    if module is None:
        module = ModuleType(full, f"DSPy's `{path}`: {PATHS[path]}.")
        module.__spec__ = ModuleSpec(full, None, origin=__file__, is_package=True)
        module.__path__ = []
        module.__file__ = __file__  # errors of imports name it, and so lead to the table
        module.__package__ = full
        sys.modules[full] = module
    vars(module).setdefault("__getattr__", _lookup(face, path))
    vars(module).setdefault("__dir__", lambda: sorted({*vars(module), *PATHS[path].split()}))
    # `utils.syncify` is a function and a module in DSPy too, and the function is what it gives.
    if not above or name not in PATHS[above].split():
        vars(parent).setdefault(name, module)


def _lookup(face: ModuleType, path: str) -> Callable[[str], Any]:
    names = PATHS[path].split()

    def __getattr__(name: str) -> Any:  # noqa: N807  # what Python asks of a module
        if name == "__all__":  # for `import *`, which takes what is there
            return [each for each in names if _find(face, each) is not None]
        found = _find(face, name) if name in names else None
        if found is None:
            raise AttributeError(
                f"`{face.__name__}.{path}` has no {name!r}; {_PAGE}."
                if name not in names
                else f"`{name}` is not part of this version of {face.__name__}."
            )
        return found

    return __getattr__


def _find(face: ModuleType, name: str) -> Any:
    """Return what a name stands for; None where this version does not have it."""
    found = getattr(face, name, None)
    place, _, own_name = ELSEWHERE.get(name, "").partition(":")
    if found is None and place:
        try:
            module = importlib.import_module(f"{face.__name__}.{place}")
            found = getattr(module, own_name or name, None)
        except ModuleNotFoundError as error:
            if error.name != f"{face.__name__}.{place}":
                raise
    return found
