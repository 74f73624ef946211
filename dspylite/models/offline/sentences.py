"""Splits text and Markdown into sentences, and words into stems, for the offline reader.

Headings, tables and code are left out of sentences. Not here: which sentence fits a question
(`evidence.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_SPAN_CHARS = 400
"""Longest sentence given as an answer; longer ones are cut at words."""

_MAX_WORD_CHARS = 64
_LABEL_LINE_CHARS = 50  # a longer "Name: text" line may go on in the next one; guessed
_MAX_HEADING_CHARS = 200  # it is read again with each sentence below it

STOP_WORDS = frozenset(
    "a about all also am an and any are as at be been being both but by can could did do does "
    "doing each for from get had has have having he her here him his how i if in into is it its "
    "itself let many may me might more most much must my no nor not now of on one only or other "
    "our own please say shall she should so some such tell than that the their them then there "
    "these they this those to too under up upon us use used uses using very was we were what "
    "when where which while who whom whose why will with would you your".split()
)

_WORD = re.compile(r"\w+")
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SUFFIXES = tuple("ations ation ings ing edly ers ed er ies es ly s e".split())

_BULLET = re.compile(r"(?:[-*+•]|\d{1,3}[.)])\s+")
_HEADING = re.compile(r"#{1,6}\s+")
_TABLE_RULE = re.compile(r"[\s|:-]+")
_CODE_LINE = re.compile(r"(?:\$|%|>>>|\.\.\.|<!--|!\[|:::|@\w)")
LABEL = re.compile(r"([\w`*][\w `*-]{0,30}):\s+(\S.{0,300})", re.DOTALL)
_DRAWING = re.compile(r"[\u2500-\u257f]{2}")
_LINK = re.compile(r"!?\[([^\[\]]{0,300})\]\([^()\s]{0,500}\)")
_TAG = re.compile(
    r"</?(?:a|b|br|code|div|em|h\d|i|img|kbd|li|p|span|strong|sub|sup|ul)\b[^<>]{0,300}>"
)
_BOLD = re.compile(r"\*\*((?:[^*`]|`[^*`]{0,100}`){1,300})\*\*")
_BOUNDARY = re.compile(r"[.!?…][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'\u201c])(?:[A-Z]|e\.g|i\.e|etc|vs|cf|al|ca|approx|Dr|Mr|Mrs|Ms|Prof|St|Nos?|Figs?"
    r"|Eqs?|pp?|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)
_ENDS = (".", "!", "\u3002", "\uff01", '."', ".\u201d", ".)")
_DANGLING = re.compile(
    r"(?:And|Also|But|He|However|It|Its|She|So|That|Their|Then|Therefore|These|They|This|Those|Thus)\b"
)
_EMPHASIS = re.compile(r"(?<![\w*])\*(\w|\w[^*`]{0,100}?\w)\*(?![\w*])")
_CODE_SPAN = re.compile(r"`[^`]*`")
_CODE_NOISE = re.compile(r"[{}=\\]|->|\w\(\w*\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A text that answers may be taken from.

    Attributes:
        text: Plain text or Markdown.
        source: Name of the input it came in.
        number: Its place in a list of passages, from 1; 0 for an input that is one text.
        title: Words that say what it is about, such as a document's title.
    """

    text: str
    source: str = ""
    number: int = 0
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A sentence, or what comes nearest to one.

    Attributes:
        text: On one line, without Markdown's marks.
        passage: Index of its passage.
        about: Headings and lead-ins above it.
        before: The sentence before it in the same paragraph, if it leans on that one ("It ...").
        quality: From 0 to 1, how well it reads as an answer on its own.
    """

    text: str
    passage: int
    about: str = ""
    before: str = ""
    quality: float = 1.0

    @property
    def answer(self) -> str:
        """The text, after the sentence that it leans on."""
        both = f"{self.before} {self.text}".strip()
        return both if len(both) <= MAX_SPAN_CHARS else self.text


def stem(word: str) -> str:
    """Cut the ending off a word in small letters, so that its forms become equal.

    Example:
        >>> [stem(word) for word in ("cache", "cached", "caching", "retries", "retry")]
        ['cach', 'cach', 'cach', 'retry', 'retry']
    """
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix) + ("y" if suffix == "ies" else "")
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return f"{word[:-1]}y" if len(word) > 3 and word.endswith("i") else word


def terms(text: str) -> list[str]:
    """List the stems of the words that carry meaning, in order; names in code give their parts too.

    Example:
        >>> terms("How do I use the RateLimit?"), terms("MAX_WORDS")
        (['ratelimit', 'rat', 'limit'], ['max_word', 'max', 'word'])
    """
    found: list[str] = []
    for word in _WORD.findall(text):
        if word[-1] > "\u2e7f":  # scripts without spaces between words
            found.extend(word[i : i + 2] for i in range(max(len(word) - 1, 1)))
            continue
        word = word[:_MAX_WORD_CHARS]  # noqa: PLW2901
        small = word.lower()
        if small in STOP_WORDS:
            continue
        found.append(stem(small))
        if "_" in word or (small != word and not word.isupper() and not word[1:].islower()):
            parts = [part.lower() for part in _PART.findall(word)]
            if len(parts) > 1:
                found.extend(stem(p) for p in parts if len(p) > 1 and p not in STOP_WORDS)
    return found


def clean(text: str) -> str:
    """Take Markdown's marks out of a piece of prose and put it on one line.

    Example:
        >>> clean("See **the** [docs](https://example.org) of `LM`.")
        'See the docs of `LM`.'
    """
    text = " ".join(text.split())
    if "[" in text:
        text = _LINK.sub(r"\1", text)
    if "<" in text:
        text = _TAG.sub("", text)
    if "**" in text:
        text = _BOLD.sub(r"\1", text)
    if "*" in text:
        text = _EMPHASIS.sub(r"\1", text)
    return text.strip()


def split_sentences(text: str) -> list[str]:
    """Split one paragraph into sentences; code spans, brackets and abbreviations stay whole.

    Example:
        >>> split_sentences("It waits, e.g. for 1.5 s. Then (if told to. Or not) it `stops. Now`.")
        ['It waits, e.g. for 1.5 s.', 'Then (if told to. Or not) it `stops. Now`.']
    """
    found: list[str] = []
    start = scanned = depth = ticks = 0
    for boundary in _BOUNDARY.finditer(text):
        end = boundary.end()
        piece = text[scanned:end]
        scanned = end
        ticks += piece.count("`")
        depth = max(depth + piece.count("(") - piece.count(")"), 0)
        is_open = ticks % 2 == 1 or depth > 0
        following = text[end : end + 1]
        if end - start <= MAX_SPAN_CHARS and (
            is_open
            or following.islower()
            or _ABBREVIATION.search(text[max(start, end - 12) : end].rstrip())
        ):
            continue
        found.append(text[start:end].strip())
        start, depth, ticks = end, 0, 0
    found.append(text[start:].strip())
    return [piece for sentence in found if sentence for piece in _cut(sentence)]


def _cut(sentence: str) -> Iterator[str]:
    """Cut what is too long for an answer at a semicolon, else between words, else anywhere."""
    start = 0
    while len(sentence) - start > MAX_SPAN_CHARS:
        limit = start + MAX_SPAN_CHARS
        ends = (sentence.rfind(mark, start + MAX_SPAN_CHARS // 4, limit) for mark in ("; ", " "))
        end = next((end + 1 for end in ends if end > 0), limit)
        yield sentence[start:end].strip()
        start = end
    yield sentence[start:].strip()


def read_spans(passage: Passage, index: int) -> Iterator[Span]:
    """Take the sentences out of a passage, each with the headings above it."""
    title = passage.title[:_MAX_HEADING_CHARS]
    blocks = list(_blocks(passage.text)) or [(clean(passage.text), "", 0.5)]  # nothing but code
    for block, about, share in blocks:
        before, asked = "", ""
        for sentence in split_sentences(block):
            if sentence.endswith("?"):
                asked = sentence  # as in a list of questions: what follows is about it
            leans = bool(before) and _DANGLING.match(sentence) is not None
            yield Span(
                text=sentence,
                passage=index,
                about=" ".join(part for part in (title, about, asked) if part),
                before=before if leans else "",
                quality=share * _quality(sentence, leans=leans),
            )
            before = "" if sentence.endswith((":", "?")) else sentence


def _quality(sentence: str, *, leans: bool) -> float:
    bare = _CODE_SPAN.sub("x", sentence)
    words = bare.count(" ") + 1
    quality = 0.3 if words < 3 else 0.7 if words < 5 else 0.85 if words > 50 else 1.0
    if sentence.endswith("?"):
        quality *= 0.2
    elif sentence.endswith(":"):
        quality *= 0.1
    elif not sentence.endswith(_ENDS):
        quality *= 0.7
    if sentence[0].islower():  # the end of a sentence that was cut
        quality *= 0.7
    if leans or _DANGLING.match(sentence):
        quality *= 0.9
    if _CODE_NOISE.search(bare):
        quality *= 0.5
    if sum(char.isalpha() or char == " " for char in bare) < 0.7 * len(bare):
        quality *= 0.4
    return quality


def _blocks(text: str) -> Iterator[tuple[str, str, float]]:
    """Give each paragraph, list item and table row with what stands above it and its worth."""
    lines = text.splitlines()
    code, commands = _code_lines(lines)
    heading = lead = ""
    in_list = False
    held: list[str] = []

    def flush() -> Iterator[tuple[str, str, float]]:
        nonlocal lead
        block = clean(" ".join(held))
        share = 0.5 if held and in_list and held[0].startswith("[") else 1.0  # a table of contents
        held.clear()
        if block:
            yield block, f"{heading} {lead}".strip(), share
            lead = block[-_MAX_HEADING_CHARS:] if block.endswith(":") else lead

    for number, raw in enumerate(lines):
        line = raw.strip().lstrip("> ") if raw.lstrip().startswith("> ") else raw.strip()
        if number in code or not line or _CODE_LINE.match(line) or _DRAWING.search(line):
            yield from flush()
        elif _HEADING.match(line):
            yield from flush()
            heading, lead, in_list = clean(line.strip("# "))[:_MAX_HEADING_CHARS], "", False
        elif line.strip("=-") == "" and len(line) > 2:  # underlines a heading, or rules a page
            if len(held) == 1:
                heading, lead = clean(held.pop())[:_MAX_HEADING_CHARS], ""
            yield from flush()
        elif line.startswith("|"):
            yield from flush()
            below = lines[number + 1].strip() if number + 1 < len(lines) else ""
            if not _is_rule(line) and not _is_rule(below):
                row = clean(_row_text(line))
                yield row, f"{heading} {lead}".strip(), 0.6
        else:
            bullet = _BULLET.match(line)
            above = held[-1] if held else "."
            after_label = len(above) <= _LABEL_LINE_CHARS and LABEL.fullmatch(above)
            ended = after_label or above.endswith((".", "!", "?", ":"))
            if bullet or after_label or (ended and LABEL.fullmatch(line)):
                yield from flush()
            elif in_list and not held and not raw.startswith((" ", "\t")):
                lead = ""  # a paragraph after a list
            in_list = bool(bullet) or (in_list and bool(held))
            held.append(line[bullet.end() :] if bullet else line)
            if number in commands:
                held.append(f"`{commands[number]}`.")
    yield from flush()


def _code_lines(lines: list[str]) -> tuple[set[int], dict[int, str]]:
    """Find the lines of code blocks; also of one whose beginning or end was cut off.

    Returns:
        Their numbers; and commands, which are blocks of one line, by the line "Do this:" above.
    """
    fences = [place for place, line in enumerate(lines) if line.lstrip().startswith(("```", "~~~"))]
    if len(fences) % 2:
        was_open = not lines[fences[0]].strip("`~ \t")  # an opening fence often names a language
        fences = [0, *fences] if was_open else [*fences, len(lines) - 1]
    code: set[int] = set()
    commands: dict[int, str] = {}
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        code.update(range(opening, closing + 1))
        above = opening - 1 if opening and lines[opening - 1].strip() else opening - 2
        if closing - opening == 2 and above >= 0 and lines[above].rstrip().endswith(":"):
            command = lines[opening + 1].strip()
            if command and len(command) <= 100 and "`" not in command:
                commands[above] = command
    return code, commands


def _row_text(line: str) -> str:
    """Give the wordiest cell of a table row, after the first cell with a word, which names it."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    wordy = max(cells, key=lambda cell: cell.count(" "))
    name = next((cell for cell in cells if sum(char.isalpha() for char in cell) > 2), wordy)
    return wordy if name == wordy or len(name) > 60 else f"{name}: {wordy}"


def _is_rule(line: str) -> bool:
    return "-" in line and "|" in line and _TABLE_RULE.fullmatch(line) is not None
