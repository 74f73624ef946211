"""Programs made of language-model calls, run from any thread, task or process.

`import dspylite as dspy` gives DSPy's names for running programs. This file is the one public list;
nothing inside the package imports it.
"""

import importlib
import sys
import types
import typing

from dspylite.adapters.base import Adapter
from dspylite.adapters.json import JSONAdapter
from dspylite.adapters.sections import ChatAdapter
from dspylite.concurrency.executors import asyncify, syncify
from dspylite.concurrency.outcome import Outcome
from dspylite.concurrency.parallel import Parallel
from dspylite.dspy_paths import install as _install_paths
from dspylite.dspy_paths import missing as _missing
from dspylite.errors import (
    AdapterParseError,
    BatchError,
    BatchInterrupted,
    BatchShapeError,
    BudgetExceededError,
    CallCancelledError,
    CircuitOpenError,
    ClosedError,
    ContentFilterError,
    ContextWindowExceededError,
    DeadlineExceededError,
    DSPyError,
    EmbeddingError,
    EmbeddingShapeError,
    EmbeddingValueError,
    EvaluationError,
    FlowError,
    InputFieldError,
    ItemSkippedError,
    ItemTimeoutError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMNotConfiguredError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    MediaError,
    MediaFetchError,
    MetricError,
    MissingExtraError,
    ModuleError,
    OverloadedError,
    SavedEmbeddingsError,
    SavingError,
    SettingsError,
    SignatureError,
    ToolError,
    TruncatedError,
    finished_results,
    is_retryable_lm_error,
)
from dspylite.models.base import BaseLM
from dspylite.models.breaker import CircuitBreaker, Health
from dspylite.models.cache import configure as _cache
from dspylite.models.cache.cache import Cache, CacheStats
from dspylite.models.cache.configure import configure_cache
from dspylite.models.fallback import Fallback
from dspylite.models.limits import MaxConcurrency
from dspylite.models.lm import LM, OfflineLM
from dspylite.models.rates import RateLimit
from dspylite.models.retry import Retry
from dspylite.models.streams import LMStream
from dspylite.programs.base import Module
from dspylite.programs.predict import ChainOfThought, Predict
from dspylite.runtime.budgets import budget
from dspylite.runtime.calls import BaseCallback, LMOutputs, with_callbacks
from dspylite.runtime.cancellation import check_cancelled
from dspylite.runtime.frames import current_call
from dspylite.runtime.history import HistoryEntry
from dspylite.runtime.inspection import inspect_history
from dspylite.runtime.settings import SettingsWarning, configure, context, settings
from dspylite.runtime.threads import (
    ThreadPoolExecutor,
    bind,
    bind_iter,
    propagate_to_threads,
)
from dspylite.runtime.tracking import CallCounts, UsageTracker, track_usage
from dspylite.schema.messages import Attempt, LMDelta, LMRequest, LMResponse, Usage
from dspylite.schema.records import Completions, Example, Prediction
from dspylite.schema.signature import (
    InputField,
    OutputField,
    Signature,
    infer_prefix,
    make_signature,
)

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from dspylite import evaluate as evaluate
    from dspylite import retrievers as retrievers
    from dspylite import streaming as streaming
    from dspylite.adapters.baml import BAMLAdapter
    from dspylite.adapters.two_step import TwoStepAdapter
    from dspylite.adapters.types.audio import Audio
    from dspylite.adapters.types.base import Type
    from dspylite.adapters.types.citations import Citations, Document
    from dspylite.adapters.types.file import File
    from dspylite.adapters.types.history import History
    from dspylite.adapters.types.image import Image
    from dspylite.adapters.types.text import Code, Reasoning
    from dspylite.adapters.types.tools import Tool, ToolCallResults, ToolCalls
    from dspylite.adapters.xml import XMLAdapter
    from dspylite.concurrency.microbatch import MicroBatcher, Unbatchify
    from dspylite.models.embedder import Embedder
    from dspylite.models.matrix import EmbeddingMatrix
    from dspylite.models.retrieval.knn import KNN
    from dspylite.models.retrieval.retriever import Embeddings, EmbeddingsWithScores
    from dspylite.programs.evaluation.evaluate import Evaluate
    from dspylite.programs.evaluation.judges import CompleteAndGrounded, SemanticF1
    from dspylite.programs.evaluation.metrics import (
        answer_exact_match,
        answer_passage_match,
        normalize_text,
    )
    from dspylite.programs.evaluation.result import EvaluationResult
    from dspylite.programs.listening import StreamListener
    from dspylite.programs.loading import load
    from dspylite.programs.loading_settings import load_settings
    from dspylite.programs.react import ReAct
    from dspylite.programs.react_v2 import ReActV2
    from dspylite.programs.sampling import BestOfN, Refine
    from dspylite.programs.sse import streaming_response
    from dspylite.programs.stream_events import StatusMessage, StatusMessageProvider, StreamResponse
    from dspylite.programs.streaming import streamify
    from dspylite.programs.voting import MultiChainComparison, majority

    cache: Cache
    """The cache of this process; assign another `Cache` to replace it."""


_LATER: dict[str, str] = {
    "adapters.baml": "BAMLAdapter",
    "adapters.two_step": "TwoStepAdapter",
    "adapters.types.audio": "Audio",
    "adapters.types.base": "Type",
    "adapters.types.citations": "Citations Document",
    "adapters.types.file": "File",
    "adapters.types.history": "History",
    "adapters.types.image": "Image",
    "adapters.types.text": "Code Reasoning",
    "adapters.types.tools": "Tool ToolCallResults ToolCalls",
    "adapters.xml": "XMLAdapter",
    "concurrency.microbatch": "MicroBatcher Unbatchify",
    "models.embedder": "Embedder",
    "models.matrix": "EmbeddingMatrix",
    "models.retrieval.knn": "KNN",
    "models.retrieval.retriever": "Embeddings EmbeddingsWithScores",
    "programs.evaluation.evaluate": "Evaluate",
    "programs.evaluation.judges": "CompleteAndGrounded SemanticF1",
    "programs.evaluation.metrics": "answer_exact_match answer_passage_match normalize_text",
    "programs.evaluation.result": "EvaluationResult",
    "programs.listening": "StreamListener",
    "programs.loading": "load",
    "programs.loading_settings": "load_settings",
    "programs.react": "ReAct",
    "programs.react_v2": "ReActV2",
    "programs.sampling": "BestOfN Refine",
    "programs.sse": "streaming_response",
    "programs.stream_events": "StatusMessage StatusMessageProvider StreamResponse",
    "programs.streaming": "streamify",
    "programs.voting": "MultiChainComparison majority",
}
"""Names by the file they come from when they are used; most programs need few of them."""

_PLACES = {name: file for file, names in _LATER.items() for name in names.split()}


class _Face(types.ModuleType):
    """This module, whose cache may be replaced, and whose rarer names are loaded when used."""

    @property
    def cache(self) -> Cache:
        """The cache of this process; assign another `Cache` to replace it."""
        return _cache.current_cache()

    @cache.setter
    def cache(self, value: Cache) -> None:
        before = _cache.current_cache()
        _cache.use_cache(value)
        vars(self)["_cache_before"] = before

    @cache.deleter
    def cache(self) -> None:
        """Put back the cache before the last assignment, as `unittest.mock.patch` expects it."""
        _cache.use_cache(vars(self).pop("_cache_before", _cache.current_cache()))

    if not typing.TYPE_CHECKING:  # a checker knows which names there are

        def __getattr__(self, name: str) -> typing.Any:
            """Load what is asked for the first time; else say why a name of DSPy's is not here."""
            if name not in _PLACES:
                raise _missing(name)
            found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
            vars(self)[name] = found
            return found

        def __dir__(self) -> list[str]:
            """Name what is still to be loaded, too."""
            return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Face
_install_paths(sys.modules[__name__])

__all__ = [
    "Adapter",
    "AdapterParseError",
    "Attempt",
    "Audio",
    "BAMLAdapter",
    "BaseCallback",
    "BaseLM",
    "BatchError",
    "BatchInterrupted",
    "BatchShapeError",
    "BestOfN",
    "BudgetExceededError",
    "Cache",
    "CacheStats",
    "CallCancelledError",
    "CallCounts",
    "ChainOfThought",
    "ChatAdapter",
    "CircuitBreaker",
    "CircuitOpenError",
    "ClosedError",
    "CompleteAndGrounded",
    "Citations",
    "Code",
    "Completions",
    "ContentFilterError",
    "ContextWindowExceededError",
    "DSPyError",
    "DeadlineExceededError",
    "Document",
    "Embedder",
    "EmbeddingError",
    "EmbeddingMatrix",
    "EmbeddingShapeError",
    "EmbeddingValueError",
    "Embeddings",
    "EmbeddingsWithScores",
    "Evaluate",
    "EvaluationError",
    "EvaluationResult",
    "Example",
    "Fallback",
    "File",
    "FlowError",
    "Health",
    "History",
    "HistoryEntry",
    "Image",
    "InputField",
    "InputFieldError",
    "ItemSkippedError",
    "ItemTimeoutError",
    "JSONAdapter",
    "KNN",
    "LM",
    "LMAuthError",
    "LMConfigurationError",
    "LMDelta",
    "LMError",
    "LMInvalidRequestError",
    "LMNotConfiguredError",
    "LMOutputs",
    "LMRateLimitError",
    "LMRequest",
    "LMResponse",
    "LMServerError",
    "LMStream",
    "LMTimeoutError",
    "LMTransportError",
    "LMUnexpectedError",
    "MaxConcurrency",
    "MetricError",
    "MediaError",
    "MediaFetchError",
    "MicroBatcher",
    "MissingExtraError",
    "Module",
    "ModuleError",
    "MultiChainComparison",
    "OfflineLM",
    "Outcome",
    "OutputField",
    "OverloadedError",
    "Parallel",
    "Predict",
    "Prediction",
    "RateLimit",
    "Refine",
    "Reasoning",
    "ReAct",
    "ReActV2",
    "Retry",
    "SavedEmbeddingsError",
    "SemanticF1",
    "SavingError",
    "SettingsError",
    "SettingsWarning",
    "Signature",
    "SignatureError",
    "StatusMessage",
    "StatusMessageProvider",
    "StreamListener",
    "StreamResponse",
    "ThreadPoolExecutor",
    "Tool",
    "ToolCallResults",
    "ToolCalls",
    "ToolError",
    "TruncatedError",
    "TwoStepAdapter",
    "Type",
    "Unbatchify",
    "Usage",
    "UsageTracker",
    "XMLAdapter",
    "answer_exact_match",
    "answer_passage_match",
    "asyncify",
    "bind",
    "bind_iter",
    "budget",
    "cache",
    "check_cancelled",
    "configure",
    "configure_cache",
    "context",
    "current_call",
    "finished_results",
    "infer_prefix",
    "inspect_history",
    "is_retryable_lm_error",
    "majority",
    "load",
    "load_settings",
    "make_signature",
    "normalize_text",
    "propagate_to_threads",
    "settings",
    "streamify",
    "streaming",
    "streaming_response",
    "syncify",
    "track_usage",
    "with_callbacks",
]
