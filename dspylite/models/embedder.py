"""`Embedder`: texts to vectors, through a hosted model, a function of your own, or offline hashing.

Not here: what one call does (`models/embedding/run.py`), the block of vectors it gives
(`models/matrix.py`), and how texts are hashed (`models/offline/hashing.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from copy import deepcopy
from typing import Any, Self, get_args

from dspylite.abc import Engine, Io
from dspylite.errors import InputFieldError, LMConfigurationError, MissingExtraError
from dspylite.models.direct.embedding import DirectEmbedding
from dspylite.models.direct.providers import provider_of
from dspylite.models.embedding.batches import MAX_BATCH_TOKENS
from dspylite.models.embedding.chunks import split_text
from dspylite.models.embedding.rows import Shape, is_matryoshka
from dspylite.models.embedding.run import Plan, Progress, Run
from dspylite.models.embedding.sources import EmbedFunction, Function, Hashing, Hosted, Source
from dspylite.models.embedding.tokens import Tokenizer, tokenizer_for
from dspylite.models.embedding.window import Overflow, Window
from dspylite.models.engines import checked_engine
from dspylite.models.knowledge import Price, checked_price
from dspylite.models.limits import check_count
from dspylite.models.litellm import LiteLLMEmbedding
from dspylite.models.matrix import EmbeddingMatrix
from dspylite.models.numpy_door import load_numpy
from dspylite.models.offline.engine import OFFLINE_PREFIX
from dspylite.models.parameters import check_params, copied
from dspylite.models.policies import POLICY_NAMES, Policies
from dspylite.runtime.cancellation import check_cancelled
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.gates import Places
from dspylite.runtime.progress import show_progress
from dspylite.runtime.settings import check_deadline, settings

HASHING_MODEL = "offline/hashing"
DEFAULT_HASH_DIMENSIONS = 512
DEFAULT_WIDTH = 8
"""Batches of one call under way at once at a hosted model; guessed. Where that is too many, the
gate before the endpoint finds it out."""

_ENGINES: Mapping[bool, Engine] = {True: DirectEmbedding(), False: LiteLLMEmbedding()}
_NO_POLICY_HERE = ("fallbacks", "fallback_on")
_POLICY_NAMES = POLICY_NAMES | {"num_retries"}
_OWN: Mapping[str, Any] = {
    "batch_size": 200,
    "caching": True,
    "cache_id": None,
    "dimensions": None,
    "matryoshka": None,
    "instruction": "",
    "query_instruction": "",
    "max_tokens": None,
    "overflow": "error",
    "tokenizer": None,
    "max_batch_tokens": None,
}
"""What `copy` sets as it is, and its value where a change takes it away."""
_OF_PROCESS = ("_plan", "_places")


class Embedder:
    """Turns texts into vectors, in order, from threads and tasks alike.

    Equal texts are sent once. Batches go out several at a time, each through the retries and limits
    that the endpoint has for all models; one that fails is sent again alone, and one that a single
    text breaks is halved until that text is found. Vectors of hosted models are kept in the cache,
    each under its own text. A vector that is none, or is not like the others, is an error.

    Args:
        model: A hosted model (`"openai/text-embedding-3-small"`), `"offline/hashing"`, or a
            function from a list of texts to one vector per text; the function may be async.
        batch_size: Most texts in one request.
        caching: Whether vectors may be reused. Those of a function are under a `cache_id` only.
        max_concurrency: Most requests at once to this endpoint with this key, over all threads and
            event loops; most calls at once of a function. None: 8 batches at once in each call, and
            one of a function's, which need not be safe to call from several threads.
        num_retries: Further attempts of a batch after a failure that may pass. None: 3, and
            overload is waited out (see `Retry`); none for a function.
        engine: Who makes the requests: `"direct"`, `"litellm"` or `"auto"`, as for `LM`.
        cache_id: Names a function and its version, so that its vectors can be kept.
        dimensions: How many numbers a vector has. A hosted model's server is asked for it; what it
            gives is checked, and brought back to length 1 where the server has not. For a function
            it is one of its keywords, unless `matryoshka=True`. `offline/hashing`: 512.
        matryoshka: Whether vectors may be cut to `dimensions` here and brought to length 1, which
            is right for models that were trained for it. True: they are, and the server is not
            asked. None: where the server ignores `dimensions` and the model is known for it.
        instruction: Put before each text, such as `"passage: "`.
        query_instruction: Put before each text that is embedded as a query.
        max_tokens: Most tokens of one text, its instruction included. None: not looked at, and what
            a server does with longer texts is its own affair; some cut them without a word.
        overflow: What is done with longer texts: `"error"`, `"truncate"` (the end is left out) or
            `"pool"` (its parts are embedded; the mean of their vectors, weighted by their tokens,
            is brought to length 1).
        tokenizer: Counts tokens: the path of a `tokenizer.json`, or a function from a text to the
            ends of its tokens. None: the model's own where it is there offline, else an estimate.
        max_batch_tokens: Most tokens in one request. None: 250,000.
        price: US dollars for a million tokens, for `budget(usd=...)`. None: litellm's table.
        **kwargs: Sent with every request (`api_key`, `api_base`, `timeout`, `extra_headers`,
            `extra_body` ...), or passed to the function. `deadline_s` for a whole call. Policies as
            of `LM`: `rpm`, `tpm`, `max_queue`, `max_retry_wait_s`, `patience_s`, `circuit_breaker`,
            `adaptive`, `middleware`; not `fallbacks`, because another model's vectors mean others.

    Raises:
        LMConfigurationError: A parameter cannot work.

    Example:
        >>> Embedder("offline/hashing", dimensions=64).embed(["a cat", "a dog"]).shape
        (2, 64)
    """

    def __init__(
        self,
        model: str | EmbedFunction,
        batch_size: int = 200,
        caching: bool = True,
        *,
        max_concurrency: int | None = None,
        num_retries: int | None = None,
        engine: str | None = None,
        cache_id: str | None = None,
        dimensions: int | None = None,
        matryoshka: bool | None = None,
        instruction: str = "",
        query_instruction: str = "",
        max_tokens: int | None = None,
        overflow: Overflow = "error",
        tokenizer: (
            str | os.PathLike[str] | Callable[[str], Sequence[int]] | Tokenizer | None
        ) = None,
        max_batch_tokens: int | None = None,
        price: float | Price | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.caching = caching
        self.cache_id = cache_id
        self.dimensions = dimensions
        self.matryoshka = matryoshka
        self.instruction = instruction
        self.query_instruction = query_instruction
        self.max_tokens = max_tokens
        self.overflow: Overflow = overflow
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self._engine_name = checked_engine(engine)
        self._price = _checked_price(price)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in POLICY_NAMES}
        self.policies = Policies(num_retries=num_retries, max_concurrency=max_concurrency, **given)
        self.kwargs = kwargs
        self._start()

    def _start(self, places: Places | None = None) -> None:
        """Check the parameters, and make what an embedder has in this process only.

        Args:
            places: Of an embedder with the same function and limit.
        """
        if self.max_concurrency is not None:
            check_count("max_concurrency", self.max_concurrency, least=1, otherwise="leave it out")
        for name in ("batch_size", "dimensions", "max_tokens", "max_batch_tokens"):
            if (value := getattr(self, name)) is not None or name == "batch_size":
                check_count(name, value, least=1, otherwise="leave it out for the usual one")
        for name in ("instruction", "query_instruction"):
            if not isinstance(value := getattr(self, name), str):
                raise LMConfigurationError(f"`{name}` must be a text, not {value!r:.100}.")
        if self.overflow not in get_args(Overflow):
            raise LMConfigurationError(
                f"`overflow` must be one of {', '.join(get_args(Overflow))}, not {self.overflow!r}."
            )
        for name in _NO_POLICY_HERE:
            if getattr(self.policies, name):
                raise LMConfigurationError(
                    f"An embedder takes no `{name}`: vectors of another model do not go together "
                    "with those of this one."
                )
        check_deadline("deadline_s", self.kwargs.get("deadline_s"))
        self._places = places
        if isinstance(self.tokenizer, str | os.PathLike):  # a worker may stand in another folder
            self.tokenizer = os.path.abspath(self.tokenizer)
        source = self._source()
        tokenizer = tokenizer_for(source.name, self.tokenizer)
        window = None
        if self.max_tokens is not None:
            window = Window(source.name, self.max_tokens, self.overflow, tokenizer)
            for instruction in (self.instruction, self.query_instruction):
                window.room(instruction)
        self._plan = Plan(
            source=source,
            shape=self._shape(source.name),
            window=window,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            max_batch_tokens=self.max_batch_tokens or MAX_BATCH_TOKENS,
            is_kept=self.caching,
        )

    @property
    def max_concurrency(self) -> int | None:
        """Most requests, or calls of a function, at once; None without a limit of its own."""
        return self.policies.max_concurrency

    @property
    def num_retries(self) -> int:
        """Further attempts of a batch after a failure that may pass."""
        return self.policies.retries

    def _source(self) -> Source:
        model = self.model
        kwargs = {name: value for name, value in self.kwargs.items() if name != "deadline_s"}
        if callable(model):
            self._refuse_policies("a function of your own")
            return self._function(model, kwargs)
        if not isinstance(model, str) or not model.strip():
            raise LMConfigurationError(
                "`model` must be a name such as 'openai/text-embedding-3-small' or a function, "
                f"not {model!r}."
            )
        if self.cache_id is not None:
            raise LMConfigurationError(
                f"`cache_id` names a function; {model!r} is known by its name and parameters. To "
                "keep programs apart use `settings.cache_namespace`."
            )
        if model.startswith(OFFLINE_PREFIX):
            if model != HASHING_MODEL or kwargs:
                raise LMConfigurationError(
                    f"`{HASHING_MODEL}` is the only offline embedder and sends nothing, so it "
                    f"takes no {sorted(kwargs)}; `model` was {model!r}."
                )
            self._refuse_policies(f"`{HASHING_MODEL}`")
            return Hashing(model, self.dimensions or DEFAULT_HASH_DIMENSIONS)
        check_params(kwargs)
        if self._engine_name == "direct" and provider_of(model) is None:
            raise LMConfigurationError(
                f"The direct engine asks OpenAI-compatible servers, not {model!r}; leave `engine` "
                "out, or write 'openai/<name>' with `api_base=` if the server is compatible."
            )
        if self.dimensions is not None and self.matryoshka is not True:
            kwargs["dimensions"] = self.dimensions
        return Hosted(
            model,
            kwargs,
            engine=_ENGINES[self._engine_name != "litellm" and provider_of(model) is not None],
            policies=self.policies,
            width=self.max_concurrency or DEFAULT_WIDTH,
            price=self._price,
        )

    def _refuse_policies(self, whose: str) -> None:
        usual = Policies(max_concurrency=self.max_concurrency)
        for name in sorted(_POLICY_NAMES):
            if getattr(self.policies, name) != getattr(usual, name):
                raise LMConfigurationError(
                    f"`{name}` is a policy around requests, and {whose} makes none that are known "
                    "here; leave it out."
                )

    def _function(self, function: EmbedFunction, kwargs: dict[str, Any]) -> Function:
        if self.dimensions is not None and self.matryoshka is not True:
            kwargs["dimensions"] = self.dimensions
        limit = self.max_concurrency
        if limit is not None and self._places is None:
            self._places = Places(limit)
        return Function(
            function,
            kwargs,
            width=limit or 1,
            places=self._places,
            cache_id=self.cache_id,
        )

    def _shape(self, name: str) -> Shape:
        if callable(self.model) and self.matryoshka is not True:
            return Shape(name)  # its own affair
        may_cut = is_matryoshka(name) if self.matryoshka is None else self.matryoshka
        return Shape(name, self.dimensions, may_cut)

    def embed(
        self, texts: Sequence[str], *, query: bool = False, progress: Progress | bool = False
    ) -> EmbeddingMatrix:
        """Turn texts into vectors and wait on this thread.

        Args:
            texts: n strings. Equal strings are sent once.
            query: Whether they are queries, so that `query_instruction` is put before them.
            progress: True draws a bar on stderr, where that is a terminal or a notebook's (extra
                `progress`). A function is called as `progress(done, total, errors)` after each
                batch, with numbers of different texts, and of the parts of long ones.

        Returns:
            A float32 block of shape (n, dim), row i for texts[i].

        Raises:
            BatchError: Some texts have a vector, others have none: `.results` has those vectors,
                `.errors` what went wrong with the others, both by index. Where no text has one, the
                first error is raised itself:
            EmbeddingShapeError: There was not one vector per text, or one has another dimension.
            EmbeddingValueError: A vector holds NaN, infinity, null or no number.
            ContextWindowExceededError: A text has more than `max_tokens`.
            LMError: The provider failed and the attempts are used up.
        """
        return run_flow(self.plan(BLOCKING, texts, query=query, progress=progress))

    async def aembed(
        self, texts: Sequence[str], *, query: bool = False, progress: Progress | bool = False
    ) -> EmbeddingMatrix:
        """Turn texts into vectors and await it; otherwise as `embed`."""
        return await self.plan(ASYNC, texts, query=query, progress=progress)

    def __call__(
        self,
        inputs: str | Sequence[str],
        batch_size: int | None = None,
        caching: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turn a text or texts into a numpy array of shape (dim,) or (n, dim).

        Args:
            inputs: A text, or n of them.
            batch_size: For this call.
            caching: For this call.
            **kwargs: What else `copy` may change, for this call.

        Raises:
            MissingExtraError: numpy is not installed; `embed` does without it.
        """
        np = _needed_numpy()
        chosen = self._for_call(batch_size, caching, kwargs)
        return _as_numpy(np, chosen.embed(_as_list(inputs)), inputs)

    async def acall(
        self,
        inputs: str | Sequence[str],
        batch_size: int | None = None,
        caching: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Await the numpy array; otherwise as `__call__`."""
        np = _needed_numpy()
        chosen = self._for_call(batch_size, caching, kwargs)
        return _as_numpy(np, await chosen.aembed(_as_list(inputs)), inputs)

    def _for_call(
        self, batch_size: int | None, caching: bool | None, kwargs: dict[str, Any]
    ) -> Self:
        if batch_size is not None:
            kwargs["batch_size"] = batch_size
        if caching is not None:
            kwargs["caching"] = caching
        return self.copy(**kwargs) if kwargs else self

    async def plan(
        self,
        io: Io,
        texts: Sequence[str],
        *,
        query: bool = False,
        progress: Progress | bool = False,
    ) -> EmbeddingMatrix:
        """Turn texts into vectors through a driver, as part of another plan."""
        check_cancelled()
        listed = list(_checked_texts(texts))  # read once: an iterator would be empty the next time
        deadline_s = self.kwargs.get("deadline_s")
        instruction = self.query_instruction if query else self.instruction
        with (
            Deadline(settings.deadline_s if deadline_s is None else deadline_s),
            show_progress(len(listed), wanted=progress is True) as bar,
        ):
            told = progress if callable(progress) else bar.update
            run = Run(self._plan, io, instruction=instruction, progress=told)
            return await run.run(listed)

    def split(self, text: str, max_tokens: int | None = None, overlap: int = 0) -> list[str]:
        """Split a text into chunks for embedding, on the borders of sentences where there are any.

        Args:
            text: Any string; a blank one has no chunks.
            max_tokens: Most tokens in a chunk, by this embedder's tokenizer. None: as many as its
                own `max_tokens` has room for.
            overlap: Tokens at most that a chunk repeats of the one before it.

        Raises:
            LMConfigurationError: A parameter cannot work.

        Example:
            >>> Embedder("offline/hashing").split("One sentence. And another one.", max_tokens=6)
            ['One sentence.', 'And another one.']
        """
        if max_tokens is None:
            if self._plan.window is None:
                raise LMConfigurationError(
                    "`split` needs `max_tokens`, which this embedder has not."
                )
            max_tokens = self._plan.window.room(self.instruction)
        chunks = split_text(text, max_tokens, self._plan.tokenizer, overlap=overlap)
        return [chunk.text for chunk in chunks]

    def copy(self, **changes: Any) -> Self:
        """Return an embedder with some parameters changed; a change to None takes one away."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__getstate__())
        for name, usual in _OWN.items():
            if name in changes:
                value = changes.pop(name)
                setattr(twin, name, usual if value is None else value)
        twin.model = changes.pop("model", self.model)
        if "engine" in changes:
            twin._engine_name = checked_engine(changes.pop("engine"))  # noqa: SLF001  # ours
        if "price" in changes:
            twin._price = _checked_price(changes.pop("price"))  # noqa: SLF001  # ours
        policies = {name: changes.pop(name) for name in list(changes) if name in _POLICY_NAMES}
        twin.policies = self.policies.with_changes(policies)
        merged = {**copied(self.kwargs), **changes}
        twin.kwargs = {name: value for name, value in merged.items() if value is not None}
        twin._start(self._places_for(twin))  # noqa: SLF001  # ours
        return twin

    def _places_for(self, twin: Self) -> Places | None:
        """Return what a twin shares, so that a limit holds over all that call a function."""
        is_same = twin.model is self.model and twin.max_concurrency == self.max_concurrency
        return self._places if is_same else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the parameters; the limit of a function holds for the copy and this one together."""
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(deepcopy(self.__getstate__(), memo))
        twin._start(self._places_for(twin))  # noqa: SLF001  # ours
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: the state of the policies."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take part in what this process knows of the endpoint."""
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        name = self.model if isinstance(self.model, str) else self._plan.source.name
        return f"Embedder({name!r}, batch_size={self.batch_size})"


def _checked_price(price: Any) -> Price | None:
    is_number = isinstance(price, int | float) and not isinstance(price, bool)
    return checked_price((price, 0) if is_number else price)


def _checked_texts(texts: Sequence[str]) -> Iterator[str]:
    # Of a set nobody knows which row is whose; of a dict the keys would be embedded.
    if isinstance(texts, str | Set | Mapping) or not isinstance(texts, Iterable):
        raise InputFieldError(
            f"`embed` takes a list of texts, not {texts!r:.100}; write `embed([text])` for one."
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputFieldError(f"Text {index} is not a string but {text!r:.100}.")
        yield text


def _as_list(inputs: str | Sequence[str]) -> Sequence[str]:
    return [inputs] if isinstance(inputs, str) else inputs


def _needed_numpy() -> Any:
    """Load numpy before anything is sent."""
    np = load_numpy()
    if np is None:
        raise MissingExtraError(
            "Calling an embedder returns a numpy array: `pip install dspylite[numpy]`, or use "
            "`embedder.embed(texts)`, which needs no numpy."
        )
    return np


def _as_numpy(np: Any, block: EmbeddingMatrix, inputs: str | Sequence[str]) -> Any:
    matrix = np.asarray(block)
    return matrix[0] if isinstance(inputs, str) else matrix
