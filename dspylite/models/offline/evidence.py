"""Finds the sentences of some passages that match a few words best: BM25, with a taste for prose.

Not here: what a sentence is (`sentences.py`), nor what is asked (`reading.py`).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspylite.models.offline.sentences import LABEL, Passage, Span, read_spans, stem, terms

MAX_SPANS = 20_000
"""Sentences read; about 2 MB of prose, and later ones are not seen."""

_K1, _B = 1.2, 0.5  # BM25's usual saturation; less length normalisation, as sentences are all short
_HEADING_SHARE, _BEFORE_SHARE, _PASSAGE_SHARE = 0.3, 0.3, 0.25  # guessed, tried on our own pages
_MAX_TOPICS = 32  # an answer with more fields than this reuses what the question alone finds
_MAX_TEXTS = 100  # sentences searched for a number, a date or a mood where nothing is asked
_GENERIC = frozenset(terms("answer output result response reply text value content"))

_DEFINITION = re.compile(
    r"(?:An?|The)?\s*([\w`'\u2019 .\-]{1,60}?)\s+(?:is|are|was|were|means?|stands? for)\s"
)

_ASKS_WHAT_IS = re.compile(r"\s*(?:what|who)(?:\s+is|\s+are|\s+was|\s+were|'s)\b", re.IGNORECASE)

_KINDS = {
    "number": re.compile(
        r"\bhow (?:many|much|long|old|far|often|big|large|fast)\b"
        r"|\b(?:what|which)\b.{0,20} (?:number|count|total|version|port|limit)\b"
    ),
    "date": re.compile(r"\b(?:when|what (?:year|date|day|month)|which (?:year|date|day|month))\b"),
    "person": re.compile(r"\bwho(?:se|m)?\b"),
    "reason": re.compile(r"\b(?:why|reason)\b"),
    "place": re.compile(r"\bwhere\b"),
    "way": re.compile(r"\bhow (?:can|could|do|does|must|should|to|would)\b"),
}
_SIGNS = {
    "number": re.compile(
        r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|once|twice|none)\b",
        re.I,
    ),
    "date": re.compile(
        r"\b1\d{3}\b|\b20\d\d\b|\b(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sep|Oct|Nov|Dec)"
    ),
    "person": re.compile(r"\s[A-Z][a-z]+|\b(?:by|author)\b"),
    "reason": re.compile(
        r"\b(?:because|since|so that|therefore|otherwise|in order to|lest)\b", re.I
    ),
    "way": re.compile("`"),
    "place": re.compile(r"\b(?:in|at|under|inside|near|below|folder|directory)\b", re.I),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A span that shares words with what was looked for.

    Attributes:
        span: The sentence.
        score: Higher is better; comparable within one search only.
        shared: The stems that it shares.
        coverage: From 0 to 1, how much of what was looked for it holds; rare words count more.
    """

    span: Span
    score: float
    shared: frozenset[str]
    coverage: float


def question_kinds(question: str) -> frozenset[str]:
    """Tell what a question wants: "number", "date", "person", "reason", "place", "way".

    Example:
        >>> sorted(question_kinds("When and where was she born?"))
        ['date', 'place']
    """
    small = question.lower()
    return frozenset(kind for kind, sign in _KINDS.items() if sign.search(small))


class Evidence:
    """Passages made searchable, sentence by sentence.

    Args:
        passages: In order of trust: where two match equally well, the earlier one wins.

    Example:
        >>> evidence = Evidence([Passage(text="Cats sleep a lot. Dogs bark at night.")])
        >>> evidence.search({"dog": 1.0})[0].span.text
        'Dogs bark at night.'
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        spans = (span for i, passage in enumerate(passages) for span in read_spans(passage, i))
        self.spans = list(itertools.islice(spans, MAX_SPANS))
        self.labels: dict[tuple[str, ...], str] = {}
        self._postings: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self._lengths: list[int] = []
        read_about = functools.cache(terms)  # headings stand above many sentences
        for place, span in enumerate(self.spans):
            own = terms(span.text)
            self._lengths.append(len(own))
            weights: dict[str, float] = dict(Counter(own))
            for share, text in ((_HEADING_SHARE, span.about), (_BEFORE_SHARE, span.before)):
                for term in read_about(text) if text else ():
                    weights.setdefault(term, share)
            for term, weight in weights.items():
                self._postings[term].append((place, weight))
            if (label := LABEL.fullmatch(span.text)) and (key := tuple(terms(label[1]))):
                self.labels.setdefault(key, label[2].strip())
        self._mean_length = max(sum(self._lengths) / max(len(self._lengths), 1), 1.0)

    def search(
        self,
        query: Mapping[str, float],
        *,
        kinds: frozenset[str] = frozenset(),
        definition: bool = False,
        limit: int = 12,
    ) -> list[Match]:
        """Rank the spans that share words with a query by BM25 and by how well they read.

        Args:
            query: Weight by stem. Only those of the greatest weight count as shared and covered.
            kinds: What the answer should hold, as `question_kinds` gives it.
            definition: Whether to prefer sentences that say what the query's words are.
            limit: How many spans to return.

        Returns:
            Matches, best first; none where no word is shared.

        Source:
            Robertson, Zaragoza: The Probabilistic Relevance Framework: BM25 and Beyond, 2009.
        """
        scores: defaultdict[int, float] = defaultdict(float)
        shared: defaultdict[int, dict[str, float]] = defaultdict(dict)
        around: defaultdict[int, dict[str, float]] = defaultdict(dict)
        total, asked, most = 0.0, 0, max(query.values(), default=0.0)
        for term, weight in query.items():
            postings = self._postings.get(term, ())
            rarity = weight * math.log(
                1 + (len(self.spans) - len(postings) + 0.5) / (len(postings) + 0.5)
            )
            if weight == most:
                total += rarity
                asked += 1
            for place, count in postings:
                length = self._lengths[place] / self._mean_length
                part = count * (_K1 + 1) / (count + _K1 * (1 - _B + _B * length))
                scores[place] += rarity * part
                if weight == most:
                    shared[place][term] = rarity * min(count, 1.0)
                    around[self.spans[place].passage][term] = rarity
        nearby = {passage: sum(found.values()) / total for passage, found in around.items()}
        matches: list[tuple[float, int]] = []
        for place, score in scores.items():
            span = self.spans[place]
            breadth = len(shared[place]) / asked + sum(shared[place].values()) / total
            worth = score * (0.1 + 0.45 * breadth)
            worth *= 1 + _PASSAGE_SHARE * nearby.get(span.passage, 0.0) + 0.1 / (1 + span.passage)
            worth *= span.quality * _bonus(span.text, kinds, query)
            if definition and len(shared[place]) == asked and _defines(span.text, shared[place]):
                worth *= 1.5
            matches.append((worth, -place))
        return [
            Match(
                span=self.spans[-place],
                score=score,
                shared=frozenset(shared[-place]),
                coverage=min(sum(shared[-place].values()) / total, 1.0),
            )
            for score, place in heapq.nlargest(limit, matches)
        ]


def _bonus(text: str, kinds: frozenset[str], query: Mapping[str, float]) -> float:
    bonus = 1.5 if any(_SIGNS[kind].search(text) for kind in kinds) else 1.0
    is_order = "way" in kinds and not query.keys().isdisjoint(terms(text[:40])[:1])
    return 1.3 * bonus if is_order else bonus


def _defines(text: str, asked: Mapping[str, float]) -> bool:
    """Tell whether the sentence is of the form "X is ...", X holding all that was asked for."""
    found = _DEFINITION.match(text)
    return found is not None and asked.keys() <= set(terms(found[1]))


class Inquiry:
    """One question put to the evidence, once for each thing that is asked for.

    Args:
        question: The question; empty where the inputs hold none.
        hints: Words that stand in for a missing question, such as the task's instructions.
        evidence: Where answers are looked for.
    """

    def __init__(self, question: str, hints: str, evidence: Evidence) -> None:
        self.question = question
        self.evidence = evidence
        self._asked = dict.fromkeys(terms(question), 1.0)
        self._hints = {} if question else dict.fromkeys(terms(hints), 0.5)
        self._kinds = question_kinds(question)
        self._definition = _ASKS_WHAT_IS.match(question) is not None
        self._found: dict[tuple[str, ...], list[Match]] = {}

    def find(self, topic: str = "") -> list[Match]:
        """Rank sentences for the question and a topic, which is the name and meaning of a field.

        Returns:
            The best sentences first, none if the question shares no word with any. Where nothing
            is asked they are, in the worst case, those that open the evidence, with coverage 0.
        """
        own = tuple(term for term in terms(topic) if term not in _GENERIC)
        if own not in self._found and len(self._found) >= _MAX_TOPICS:
            own = ()
        if own not in self._found:
            weight = 0.3 if self._asked else 1.0
            query = {**dict.fromkeys(own, weight), **self._hints, **self._asked}
            matches = self.evidence.search(query, kinds=self._kinds, definition=self._definition)
            if self._asked:  # what a field is called is no reason to take a sentence for an answer
                matches = [match for match in matches if not match.shared.isdisjoint(self._asked)]
            self._found[own] = matches or ([] if self._asked else self._opening())
        return self._found[own]

    def label(self, topic: str) -> str | None:
        """Return what stands after "topic:" in the evidence, or after the topic's first word."""
        labels = self.evidence.labels
        name = topic.partition(" ")[0]
        return labels.get(tuple(terms(topic))) or labels.get(tuple(terms(name)))

    def texts(self, topic: str = "") -> list[str]:
        """List where a value may stand, best first: a label's text, then the near matches.

        Without any question all sentences follow, up to a bound.
        """
        label = self.label(topic)
        matches = self.find(topic)
        near = [match for match in matches if match.score >= matches[0].score / 2]
        found = [match.span.answer for match in near]
        if not self.question:
            found.extend(span.text for span in self.evidence.spans[:_MAX_TEXTS])
        return [label, *found] if label else found

    def shared_words(self, match: Match) -> list[str]:
        """List words of the question that a match shares, as the question spells them."""
        words = {stem(word.lower()): word for word in reversed(re.findall(r"\w+", self.question))}
        return [word for term, word in reversed(words.items()) if term in match.shared]

    def _opening(self) -> list[Match]:
        first = self.evidence.spans[:_MAX_TOPICS]
        readable = [span for span in first if span.quality >= 0.8] or first
        return [Match(span=span, score=0.0, shared=frozenset(), coverage=0.0) for span in readable]
