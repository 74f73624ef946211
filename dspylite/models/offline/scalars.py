"""Reads numbers, dates, addresses, choices and verdicts out of what an inquiry finds.

Not here: text and structured values (`fitting.py`).
"""

from __future__ import annotations

import datetime
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dspylite.models.offline.evidence import Inquiry
from dspylite.models.offline.sentences import stem, terms

_NUMBER = re.compile(
    r"(?<![\w.,:/-])(?:-(?=\d))?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,9})?(?![\d_]|[.,:/-]\d)"
)
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate("two three four five six seven eight nine ten".split(), 2)
}
_NUMBER_OR_WORD = re.compile(rf"{_NUMBER.pattern}|\b(?:{'|'.join(_NUMBER_WORDS)})\b", re.IGNORECASE)

_MONTHS: Sequence[str] = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = rf"({'|'.join(_MONTHS)})[a-z]{{0,6}}\.?"
_DATE_FORMS = (  # each with the order of its groups: year, month, day
    (re.compile(r"\b(\d{4})-(\d\d)-(\d\d)(?!\d)"), (1, 2, 3)),
    (
        re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th)? {_MONTH},? (\d{{4}})\b", re.IGNORECASE),
        (3, 2, 1),
    ),
    (
        re.compile(rf"\b{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}})\b", re.IGNORECASE),
        (3, 1, 2),
    ),
    (re.compile(rf"\b{_MONTH} (\d{{4}})\b", re.IGNORECASE), (2, 1, 0)),
    (re.compile(r"(?<![\w-])(1\d{3}|20\d\d)(?![\w-])"), (1, 0, 0)),
)
_CLOCK = re.compile(r"(?<![\d:])([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?![\d:])")

_FORMATS: Mapping[str, tuple[re.Pattern[str] | None, str]] = {
    # how it is found in a text, and what is written where it is not
    "email": (
        re.compile(r"\b\w[\w.+-]{0,63}@\w[\w-]{0,62}(?:\.\w[\w-]{0,62}){1,4}"),
        "unknown@example.org",
    ),
    "uri": (
        re.compile(r"\bhttps?://[^\s<>\"'`()\[\]]{0,500}[^\s<>\"'`()\[\].,;:]"),
        "https://example.org/",
    ),
    "uuid": (
        re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"),
        "00000000-0000-4000-8000-000000000000",
    ),
    "ipv4": (
        re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
        "0.0.0.0",
    ),
    "ipv6": (None, "::"),
    "duration": (re.compile(r"\bP(?:\d{1,4}D|T\d{1,4}[HMS])\b"), "PT0S"),
    "json-string": (None, "null"),
    "application/json": (None, "null"),
    **{f"uuid{n}": (None, f"00000000-0000-{n}000-8000-000000000000") for n in range(1, 9)},
}
_SAME_FORMAT = {"ipv6network": "ipv6", "ipv6interface": "ipv6", "multi-host-uri": "uri"}

_POSITIVE = frozenset(
    stem(word)
    for word in "accept agree amazing approve best better correct delight easy enjoy excellent "
    "fantastic fast favorable fine fun good great happy helpful impressive joy like love lovely "
    "nice perfect pleased pleasant positive recommend right satisfied support superb true "
    "wonderful yes".split()
)
_NEGATIVE = frozenset(
    stem(word)
    for word in "angry annoying awful bad boring broke broken bug complaint crash deny disagree "
    "disappoint disappointing disgusting fail false hate horrible incorrect negative pain poor "
    "refund reject sad slow terrible ugly unhappy unfavorable upset useless waste worse worst "
    "wrong".split()
)
_CONFIDENCE = frozenset(stem(word) for word in ("confidence", "certainty", "probability"))
_NEUTRAL = frozenset("mixed neither neutral none other unclear unknown unsure".split())
_NEGATIONS = frozenset("cannot hardly never no nor not nothing without".split())
_WORD = re.compile(r"\w+(?:['\u2019]t\b)?")


def numbers(text: str) -> Iterator[int | float]:
    """Find numbers in a text, whole ones as `int`; parts of dates, versions and names are none.

    Example:
        >>> list(numbers("In 3.11.2 (2024-05-01): 1,250 rows, 0.5 s, two threads."))
        [1250, 0.5, 2]
    """
    for match in _NUMBER_OR_WORD.finditer(text):
        found = match[0].lower()
        if found in _NUMBER_WORDS:
            yield _NUMBER_WORDS[found]
        else:
            bare = found.replace(",", "")
            yield float(bare) if "." in bare else int(bare)


def dates(text: str) -> Iterator[datetime.date]:
    """Find dates in a text, the most complete forms first; a bare year is its first day.

    Example:
        >>> [str(day) for day in dates("Begun in 1998, opened on May 5th, 2001.")]
        ['2001-05-05', '1998-01-01']
    """
    for form, (year, month, day) in _DATE_FORMS:
        for match in form.finditer(text):
            name = match[month].lower() if month else "1"
            number = int(name) if name.isdigit() else _MONTHS.index(name[:3]) + 1
            try:
                yield datetime.date(int(match[year]), number, int(match[day]) if day else 1)
            except ValueError:  # such as 31 June, or the year 0
                continue
        text = form.sub(" ", text)  # a year in a full date is no date of its own


def find_format(form: str, texts: Iterable[str], nth: int = 0) -> tuple[str, bool] | None:
    """Find a text in one of JSON schema's formats.

    Args:
        form: The format's name, such as "date" or "email".
        texts: Where to look, in order of trust.
        nth: How many to skip.

    Returns:
        A text in that format and whether the texts hold it; None for a format that any text has.

    Example:
        >>> find_format("email", ["Write to <ada@example.com>."])
        ('ada@example.com', True)
        >>> find_format("time", ["no time"])
        ('00:00:00', False)
    """
    form = _SAME_FORMAT.get(form, form)
    if form.startswith(("ipv4", "ipvany")):
        form = "ipv4"
    default = ""
    found: Iterator[str]
    if form == "date":
        found = (day.isoformat() for text in texts for day in dates(text))
        default = "1970-01-01"
    elif form == "time":
        found = (_clock(match) for text in texts for match in _CLOCK.finditer(text))
        default = "00:00:00"
    elif form == "date-time":
        found = (moment for text in texts for moment in _moments(text))
        default = "1970-01-01T00:00:00"
    elif form in _FORMATS:
        pattern, default = _FORMATS[form]
        found = (
            (match[0] for text in texts for match in pattern.finditer(text))
            if pattern
            else iter(())
        )
    else:
        return None
    value = next(itertools.islice(found, nth, None), None)
    return (default, False) if value is None else (value, True)


def _clock(match: re.Match[str]) -> str:
    return f"{int(match[1]):02}:{match[2]}:{match[3] or '00'}"


def _moments(text: str) -> Iterator[str]:
    clock = _CLOCK.search(text.replace("T", " "))
    for day in dates(text.replace("T", " ")):
        yield f"{day.isoformat()}T{_clock(clock) if clock else '00:00:00'}"


def find_number(
    inquiry: Inquiry, topic: str, fits: Callable[[int | float], bool], nth: int = 0
) -> int | float | None:
    """Find a number that fits; those that the question itself holds are no answer to it."""
    asked = set(numbers(inquiry.question))
    seen = (n for text in inquiry.texts(topic) for n in numbers(text) if n not in asked and fits(n))
    return next(itertools.islice(dict.fromkeys(itertools.islice(seen, 100)), nth, None), None)


def find_confidence(inquiry: Inquiry, topic: str) -> float | None:
    """Say how much of the question the best sentence holds, if a confidence is asked for."""
    if not _CONFIDENCE & set(terms(topic)):
        return None
    matches = inquiry.find()
    return round(matches[0].coverage, 2) if matches else 0.0


def bounded_number(low: float, high: float, *, step: float | None = None, nth: int = 0) -> float:
    """Give a plain number within bounds, near 0 and whole if there is one.

    Args:
        low: Least value, `-math.inf` for none.
        high: Greatest value, `math.inf` for none.
        step: What the number is a multiple of.
        nth: How many to skip, where the bounds leave room.

    Returns:
        A number; 0 where no number lies within the bounds.

    Example:
        >>> bounded_number(1, 5), bounded_number(-9, -2.5), bounded_number(0.1, 0.3)
        (1, -3, 0.2)
        >>> bounded_number(3, 99, step=5, nth=2)
        15
    """
    unit = step or 1
    ends = sorted((end for end in (low, high) if math.isfinite(end)), key=abs)
    middle = [round(sum(ends) / 2, 6), sum(ends) / 2] if len(ends) == 2 else []
    snapped = [snap(end / unit) * unit for end in (0, *ends) for snap in (math.ceil, math.floor)]
    fitting = [n for n in (*snapped, *(() if step else (*middle, *ends))) if low <= n <= high]
    if not fitting:
        return 0
    further = (fitting[0] + sign * nth * unit for sign in (1, -1))
    return next((n for n in further if low <= n <= high), fitting[0])


def polarity(text: str) -> int:
    """Count praise minus blame in a text; "not" turns what follows within three words.

    Example:
        >>> polarity("Great food, lovely staff"), polarity("It is not good and never works")
        (2, -1)
    """
    total, turned = 0, 0
    for word in _WORD.findall(text.lower()):
        if _is_negation(word):
            turned = 3
            continue
        root = stem(word)
        value = (root in _POSITIVE) - (root in _NEGATIVE)
        total += -value if turned else value
        turned = max(turned - 1, 0)
    return total


def pick_choice(
    inquiry: Inquiry, choices: Sequence[Any], topic: str, nth: int = 0
) -> tuple[Any, bool]:
    """Choose among given answers the one that shares most with the evidence, or its mood.

    Args:
        inquiry: What is asked.
        choices: At least one value, each compared by its text.
        topic: Name and meaning of what is wanted.
        nth: How many better ones to skip.

    Returns:
        The choice, and whether anything speaks for it; where nothing does, a choice such as
        "unknown", else the first.
    """
    texts = list(inquiry.texts(topic))
    near = set(terms(" ".join(texts[:2])))
    far = set(terms(" ".join([inquiry.question, *texts])))
    label = (inquiry.label(topic) or "").casefold()
    mood = polarity(" ".join(texts))
    scored: list[tuple[float, int]] = []
    for place, choice in enumerate(choices):
        text = str(choice)
        own = terms(text) or [text.casefold()]
        score = sum(2 * (term in near) + (term in far) for term in own) / len(own)
        score += 10 * (bool(label) and label == text.casefold())
        own_mood = polarity(text) or (text.casefold() in {"yes", "true"}) - (
            text.casefold() == "no"
        )
        score += 2 * (own_mood * mood > 0)
        is_neutral = not _NEUTRAL.isdisjoint(text.casefold().split())
        score += 0.5 * (is_neutral and mood == 0)
        scored.append((-score, place))
    worth, place = sorted(scored)[min(nth, len(scored) - 1)]
    return choices[place], worth <= -1


def is_true(inquiry: Inquiry, topic: str) -> tuple[bool, bool]:
    """Judge a statement: the question, or what the topic names.

    True are a statement whose words one sentence mostly holds, both negated or neither, and a mood
    that the evidence has. This is word matching, not inference.

    Returns:
        The verdict, and whether the evidence says anything about it.
    """
    label = (inquiry.label(topic) or "").casefold().rstrip(".")
    if label in {"true", "yes", "false", "no"}:
        return label in {"true", "yes"}, True
    matches = inquiry.find(topic)
    if not inquiry.question:
        mood, said = polarity(topic), polarity(" ".join(inquiry.texts(topic)))
        if not mood and matches and matches[0].shared:
            return True, True
        return (mood or 1) * said > 0, said != 0
    if not matches:
        return False, False
    agrees = _negated(inquiry.question) == _negated(matches[0].span.text)
    return matches[0].coverage >= 0.5 and agrees, True


def _negated(text: str) -> bool:
    return sum(_is_negation(word) for word in _WORD.findall(text.lower())) % 2 == 1


def _is_negation(word: str) -> bool:
    return word in _NEGATIONS or word.endswith(("n't", "n\u2019t"))
