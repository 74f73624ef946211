"""`majority` and `MultiChainComparison`: one answer made of several that are there already.

Not here: running a program several times (`programs/sampling.py`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dspylite.abc import Io
from dspylite.adapters.values import format_value
from dspylite.errors import InputFieldError, SettingsError, nearest
from dspylite.programs.base import Planned
from dspylite.programs.predict import Predict
from dspylite.schema.records import Completions, Example, Outputs, Prediction
from dspylite.schema.signature import InputField, OutputField, ensure_signature

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def default_normalize(value: Any) -> Any:
    """Return a text without case, punctuation, English articles and needless blanks; else None.

    None says that nothing is left. A text of articles alone keeps them, because "A" is often the
    name of a choice. What is no text is returned as it is.

    Example:
        >>> [default_normalize(value) for value in ("The  Eiffel Tower!", "A.", "...", 3)]
        ['eiffel tower', 'a', None, 3]
    """
    if not isinstance(value, str):
        return value
    text = unicodedata.normalize("NFD", value).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split() or text.split()) or None


def majority(
    prediction_or_completions: Outputs | Completions | Iterable[Example | Mapping[str, Any]],
    normalize: Callable[[Any], Any] | None = default_normalize,
    field: str | None = None,
) -> Prediction:
    """Return the first of several answers that has the commonest value.

    Args:
        prediction_or_completions: A prediction of several completions (`Predict(..., n=5)`), its
            `completions`, or a list of predictions or dicts.
        normalize: Makes values that mean the same equal. Values that it turns to None do not count,
            unless all are. None compares them as they are.
        field: The output that is compared. None: the last one.

    Returns:
        The answer whole, with all its fields; of equally common values the one that came first.
        It bears the usage of the prediction given.

    Raises:
        InputFieldError: There is no answer, or one lacks the field.

    Example:
        >>> majority([{"answer": "Paris"}, {"answer": "Rome"}, {"answer": "paris."}]).answer
        'Paris'
    """
    given = prediction_or_completions
    rows = _answers("majority", given)
    if not rows:
        raise InputFieldError("`majority` was given no answer to choose from.")
    name = list(rows[0])[-1] if field is None and len(rows[0]) else field or ""
    plain = [_value(row, name) for row in rows]
    normalized = plain if normalize is None else [normalize(value) for value in plain]
    keys = [_key(value) for value in normalized]
    counts: dict[Any, int] = {}
    for key, value in zip(keys, normalized, strict=True):
        if value is not None:
            counts[key] = counts.get(key, 0) + 1
    # `max` takes the first of several equal ones, and a dict keeps the order of coming.
    place = keys.index(max(counts, key=counts.__getitem__)) if counts else 0
    chosen = Prediction.from_completions([rows[place]])
    if isinstance(given, Outputs):
        chosen.keep_cost_of(given)
    return chosen


class MultiChainComparison(Planned):
    """Asks the model to compare several attempts at a question and to give the best answer.

    Args:
        signature: What the attempts answered: a signature class or text.
        M: How many attempts there will be.
        temperature: Sampling temperature. None leaves it to the LM.
        **config: Further request parameters, and `callbacks`.

    Attributes:
        predict: The predictor that asks. Its signature has the inputs `reasoning_attempt_1` to
            `reasoning_attempt_M` more, and `rationale` as its first output.
        last_key: The output that the attempts are quoted with.
        M: As given.

    Raises:
        SettingsError: `M` is no whole number of at least 1.
        SignatureError: The signature cannot be built, or has such fields already.

    Example:
        >>> from dspylite.runtime.settings import context
        >>> from dspylite.testing import FakeLM
        >>> compare = MultiChainComparison("question -> answer", M=2)
        >>> attempts = [{"reasoning": "It rhymes.", "answer": "Rome"}, {"answer": "Paris"}]
        >>> with context(lm=FakeLM([{"rationale": "The second is right.", "answer": "Paris"}])):
        ...     compare(attempts, question="Capital of France?").answer
        'Paris'
    """

    def __init__(
        self,
        signature: Any,
        M: int = 3,  # noqa: N803  # DSPy's spelling
        temperature: float | None = 0.7,
        **config: Any,
    ) -> None:
        super().__init__(config.pop("callbacks", None))
        if isinstance(M, bool) or not isinstance(M, int) or M < 1:
            raise SettingsError(f"`M` must be a whole number of at least 1, not {M!r}.")
        self.M = M
        extended = ensure_signature(signature)
        self.last_key = list(extended.output_fields)[-1]
        for number in range(1, M + 1):
            attempt = InputField(
                prefix=f"Attempt #{number}:", desc=f"attempt number {number}, which may be wrong"
            )
            extended = extended.append(f"reasoning_attempt_{number}", attempt)
        rationale = OutputField(
            prefix="Corrected reasoning:",
            desc="weigh the attempts against each other and reason towards the right answer",
        )
        self.predict: Predict[..., Any] = Predict(
            extended.prepend("rationale", rationale), temperature=temperature, **config
        )

    async def steps(self, io: Io, /, completions: Any, **inputs: Any) -> Any:
        """Ask through `predict`.

        Args:
            io: The driver.
            completions: The attempts: a prediction of `M` completions, its `completions`, or a list
                of predictions or dicts, with their `rationale` or `reasoning` where they have one.
            **inputs: The inputs that the attempts had.

        Raises:
            InputFieldError: They are not `M`, or one lacks the answer.
        """
        attempts = _answers("MultiChainComparison", completions)
        if len(attempts) != self.M:
            raise InputFieldError(
                f"This `MultiChainComparison` compares {self.M} attempts and was given "
                f"{len(attempts)}; `M` says how many: `MultiChainComparison(..., M={self.M})`."
            )
        quoted = {
            f"reasoning_attempt_{number}": _quoted(attempt, self.last_key)
            for number, attempt in enumerate(attempts, 1)
        }
        return await self.predict.plan(io, (), {**quoted, **inputs})


def _answers(who: str, given: Any) -> list[Mapping[str, Any]]:
    """Give answers of any form as rows.

    Raises:
        InputFieldError: They are of no such form.
    """
    if isinstance(given, Outputs):
        given = given.completions
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise InputFieldError(
            f"`{who}` takes a prediction, its completions or a list of predictions, not {given!r}."
        )
    rows: list[Mapping[str, Any]] = []
    for row in given:
        if not isinstance(row, Example | Mapping):
            raise InputFieldError(
                f"One of the answers given to `{who}` is {row!r}; each must be a prediction or a "
                "dict."
            )
        rows.append(dict(row.items()))
    return rows


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise InputFieldError(
            f"One of the answers has no `{name}`. {nearest(name, row)}"
            f"It has: {', '.join(row) or 'nothing'}."
        )
    return row[name]


def _quoted(attempt: Mapping[str, Any], name: str) -> str:
    answer = format_value(_value(attempt, name)).strip()
    reasoning = attempt.get("rationale", attempt.get("reasoning"))
    text = "" if reasoning is None else format_value(reasoning).strip()
    return f"Reasoning: {text}\nAnswer: {answer}" if text else f"Answer: {answer}"


def _key(value: Any) -> Any:
    """Return something that can be counted, equal for equal values."""
    try:
        hash(value)
    except TypeError:
        return format_value(value)
    return value
