"""What counts the tokens of a text: a file, a function, OpenAI's vocabulary, an estimate.

Not here: cutting texts by it (`test_embedding_chunks.py`).
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from dspylite import LMConfigurationError
from dspylite.models.embedding import tokenizer_door
from dspylite.models.embedding.tokens import (
    EstimatedTokens,
    FileTokens,
    FunctionTokens,
    OpenAITokens,
    Tokenizer,
    tokenizer_for,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = "openai/text-embedding-3-small"

# Any characters, halves of characters and NUL among them; words, so that tokens are found again.
texts = st.lists(
    st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(
        ["the ", "Straße", " \n\n", "    ", "😀", "👩‍👩‍👧", "e\u0301", "人工", "\ud83d\ude00"]
    )
).map("".join)

SAMPLES = {
    "English": "Scientists have long suspected that birds rely on several mechanisms at once.",
    "German": "Die Geschwindigkeitsbegrenzung auf Autobahnen wird größtenteils aufgehoben.",
    "French": "L'été dernier, les élèves ont découvert une grotte près de la rivière.",
    "Dutch": "Volgens de minister van Economische Zaken zullen vooral ambachtelijke bedrijven "
    "profiteren van lagere belastingen.",
    "Italian": "Il governo ha annunciato ieri nuove misure di sostegno alle medie imprese.",
    "Bulgarian": "Правителството обяви вчера нови мерки за подкрепа на средния бизнес в страната.",
    "Finnish": "Lentokonesuihkuturbiinimoottoriapumekaanikko matkusti eilen Rovaniemelle, koska "
    "työtoverit olivat järjestäneet syntymäpäiväjuhlat.",
    "Polish": "Większość uważa, że źle byłoby ją zamknąć czterdzieści kilometrów dalej.",
    "code": 'def ends(self, text: str) -> list[int]:\n    return [m for m in finditer("x")]\n',
    "JSON": json.dumps([{"id": n * 7919, "name": f"user_{n}", "ok": True} for n in range(9)]),
    "base64": "aGVsbG8gd29ybGQsIHRoaXMgaXMgYSBsb25nZXIgdGV4dCBpbiBiYXNlNjQgZm9ybQ==" * 3,
    "hexadecimal": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08" * 2,
    "Chinese": "人工智能正在改变我们的生活方式。研究人员表示,新的语言模型能够理解复杂的问题。",
    "Japanese": "昨日、東京で開催された会議では、多くの研究者がアルゴリズムについて発表しました。",
    "Korean": "한국의 전통 음식은 계절에 따라 다양한 재료를 사용하여 만들어집니다.",
    "Russian": "Исследователи обнаружили, что птицы используют несколько механизмов навигации.",
    "Ukrainian": "Уряд оголосив про нові заходи щодо підтримки малого підприємництва.",
    "Greek": "Χθες ερευνητές ανακάλυψαν άγνωστο νεκροταφείο κοντά στη Θεσσαλονίκη.",
    "Arabic": "أعلنت الحكومة أمس عن خطة جديدة لتطوير التعليم في المناطق الريفية.",
    "Hebrew": "הממשלה הודיעה אתמול על תוכנית חדשה לפיתוח החינוך באזורים הכפריים.",
    "Hindi": "सरकार ने कल ग्रामीण क्षेत्रों में शिक्षा के विकास के लिए एक नई योजना की घोषणा की।",
    "Thai": "รัฐบาลประกาศแผนใหม่เมื่อวานนี้เพื่อพัฒนาการศึกษาในพื้นที่ชนบท",
    "emoji": "😀😂🔥🎉👍🏽👩‍👩‍👧‍👦🏳️‍🌈❤️✨🚀🫠🦾🧑‍💻🇩🇪🇯🇵⚡️☀️",
    "blanks": " \t \t\r\n" * 50,
    "docs": (ROOT / "README.md").read_text(encoding="utf-8"),
}


def words_file(folder: Path, *, cut: bool = False) -> str:
    """Write a tokenizer.json as models of BERT's kind have it: words, two tokens around them."""
    path = folder / f"words-{cut}.json"
    if path.exists():  # two trainings need not give the same
        return str(path)
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    made.train_from_iterator(SAMPLES.values(), trainer)
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    if cut:
        made.enable_truncation(8)
        made.enable_padding(length=8)
    made.save(str(path))
    return str(path)


def bytes_file(folder: Path) -> str:
    """Write a tokenizer.json of pairs of bytes, as most newer models have it."""
    path = folder / "bytes.json"
    if path.exists():
        return str(path)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SAMPLES.values(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    )
    made.save(str(path))
    return str(path)


def words_of(text: str) -> list[str]:
    """Give the words of a text: a function that a process can be told of."""
    return text.split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "estimate": lambda _: EstimatedTokens(),
    "OpenAI": lambda _: OpenAITokens(),
    "words": lambda folder: FileTokens(words_file(folder)),
    "bytes": lambda folder: FileTokens(bytes_file(folder)),
    "function": lambda _: FunctionTokens(words_of),  # type: ignore[arg-type]
}


@pytest.fixture(scope="session", params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return MAKERS[request.param](folder)


# --- What all of them keep ---------------------------------------------------------------------


@settings(deadline=None)  # the first text loads a vocabulary
@given(text=texts)
def test_ends_never_go_down_and_the_last_is_the_end_of_the_text(
    tokenizer: Tokenizer, text: str
) -> None:
    """Whoever cuts at them loses no character, whatever the text is made of."""
    ends = list(tokenizer.ends(text))
    assert ends == sorted(ends)
    assert all(0 <= end <= len(text) for end in ends)
    assert ends[-1:] == ([len(text)] if text else [])


@pytest.mark.parametrize("text", SAMPLES.values(), ids=list(SAMPLES))
@pytest.mark.parametrize("name", ["estimate", "OpenAI", "words", "bytes"])
def test_text_cut_at_the_end_of_a_token_has_so_many_tokens_or_one_more(
    folder: Path, name: str, text: str
) -> None:
    """The token that is cut may fall into two, so whoever must be sure counts again."""
    tokenizer = MAKERS[name](folder)
    ends = tokenizer.ends(text)
    for count in range(1, len(ends), 1 + len(ends) // 40):
        assert len(tokenizer.ends(text[: ends[count - 1]])) <= count + 1


@pytest.mark.parametrize(
    "text", ["", "\0", " ", "\ud83d", "a\ud83d\ude00b", "\ude00\ud83d", "\x00\x01\ufeff", "\u0301"]
)
def test_odd_text_is_counted(tokenizer: Tokenizer, text: str) -> None:
    """A half character comes out of truncated JSON, and must not end a batch of 10,000 texts."""
    assert bool(tokenizer.ends(text)) == bool(text)


HOSTILE = {
    "a letter": "a" * 1_000_000,
    "capitals": "A" * 1_000_000,
    "turns": "aB" * 500_000,
    "blanks": "a" + " " * 1_000_000 + "b",
    "runs of blanks": ("a" + " " * 999) * 1_000,
    "lines": "\n" * 1_000_000,
    "emoji": "😀" * 250_000,
    "accents": "a" + "\u0301" * 500_000,
    "marks": "!" * 1_000_000,
    "almost noise": ("a" * 31 + "-") * 30_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_megabyte_of_one_thing_is_counted_in_time_and_without_panic(
    tokenizer: Tokenizer, text: str
) -> None:
    """Time that grows with the square would be hours; tiktoken by itself panics over the blanks."""
    assert tokenizer.ends(text)[-1] == len(text)


def test_threads_count_alike(folder: Path) -> None:
    """One tokenizer is shared by all threads of a service; each also loads it at the same time."""
    made = [pickle.loads(pickle.dumps(maker(folder))) for maker in MAKERS.values()]
    expected = [
        [list(maker(folder).ends(text)) for text in SAMPLES.values()] for maker in MAKERS.values()
    ]
    barrier = Barrier(8)

    def count(_: int) -> list[list[list[int]]]:
        barrier.wait(20)
        return [[list(each.ends(text)) for text in SAMPLES.values()] for each in made]

    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(count, range(8)))


def count_there(tokenizer: Tokenizer, text: str) -> tuple[str, int, list[int]]:
    """Count in another process."""
    return tokenizer.name, tokenizer.special, list(tokenizer.ends(text))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_tokenizers_cross_processes(folder: Path, method: str) -> None:
    """An embedder with its tokenizer goes to the workers of an ingestion."""
    made = [maker(folder) for maker in MAKERS.values()]
    with get_context(method).Pool(1) as pool:
        for each in made:
            here = count_there(each, SAMPLES["German"])
            there = pool.apply_async(count_there, (each, SAMPLES["German"])).get(50)
            assert there == here


def test_pickle_of_a_file_is_small_and_a_copy_is_the_same(folder: Path) -> None:
    """A vocabulary of 17 MB is not sent along with each item."""
    tokenizer = FileTokens(words_file(folder))
    assert len(pickle.dumps(tokenizer)) < 500
    assert copy.deepcopy(tokenizer) is tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)).ends("Die") == tokenizer.ends("Die")


@pytest.mark.parametrize("change", ["missing", "another"])
def test_file_that_is_another_where_the_pickle_arrives_is_refused(
    folder: Path, tmp_path: Path, change: str
) -> None:
    """Two processes that count differently would cut one text in two ways."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(Path(words_file(folder)).read_bytes())
    tokenizer = FileTokens(str(path))
    raw = pickle.dumps(tokenizer)
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(Path(bytes_file(folder)).read_bytes())
    assert tokenizer.ends("Die")  # who has read it needs the file no more
    with pytest.raises(LMConfigurationError, match=r"cannot be read|is not the file it was"):
        pickle.loads(raw).ends("Die")


# --- Which one a model gets --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("text-embedding-3-small", OpenAITokens),
        ("openai/text-embedding-3-large", OpenAITokens),
        ("openrouter/openai/text-embedding-ada-002", OpenAITokens),
        ("azure/my-deployment", EstimatedTokens),
        ("hosted_vllm/Qwen/Qwen3-Embedding-4B", EstimatedTokens),
        ("my-text-embedding-3-small", EstimatedTokens),
        ("text-embedding-3-small/other", EstimatedTokens),
        ("", EstimatedTokens),
    ],
)
def test_model_gets_its_own_tokens_or_the_estimate(model: str, kind: type) -> None:
    """What is not known is not claimed."""
    assert type(tokenizer_for(model, None)) is kind


def test_openai_tokens_are_those_of_tiktoken() -> None:
    """The pattern is written down here, and must be the one that OpenAI uses."""
    encoding = tokenizer_door.load_cl100k()
    assert encoding is not None
    assert encoding.n_vocab == 100256
    # As OpenAI's documentation gives them for cl100k_base.
    assert encoding.encode_ordinary("tiktoken is great!") == [83, 1609, 5963, 374, 2294, 0]
    assert encoding.encode_ordinary("2 + 2 = 4") == [17, 489, 220, 17, 284, 220, 19]
    assert encoding.encode_ordinary("お誕生日おめでとう") == [
        *(33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699),
    ]


def test_character_of_several_tokens_ends_with_the_last() -> None:
    """Half an emoji cannot be cut off."""
    assert list(OpenAITokens().ends("a😀b")) == [1, 1, 2, 3]


def test_openai_without_the_file_of_litellm_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """litellm may move its file, and then nothing is fetched in its place."""
    before = pickle.dumps(OpenAITokens())
    tokenizer_door._cl100k.cache_clear()
    monkeypatch.setattr(tokenizer_door, "_CL100K_FILE", "gone")
    try:
        assert isinstance(tokenizer_for(SMALL, None), EstimatedTokens)
        with pytest.raises(LMConfigurationError, match="cl100k_base"):
            pickle.loads(before).ends("text")
    finally:
        tokenizer_door._cl100k.cache_clear()


def test_damaged_vocabulary_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other tokens than OpenAI's would be counted as if they were."""
    spec = tokenizer_door.importlib.util.find_spec("litellm")
    assert spec is not None
    assert spec.submodule_search_locations
    raw = Path(spec.submodule_search_locations[0], tokenizer_door._CL100K_FILE).read_bytes()
    (tmp_path / "cl100k").write_bytes(raw[:-20])
    tokenizer_door._cl100k.cache_clear()
    monkeypatch.setattr(tokenizer_door, "_CL100K_FILE", str(tmp_path / "cl100k"))
    try:
        assert isinstance(tokenizer_for(SMALL, None), EstimatedTokens)
    finally:
        tokenizer_door._cl100k.cache_clear()


NO_NETWORK = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("socket.") else None)
from dspylite.models.embedding.tokens import tokenizer_for
assert list(tokenizer_for("openai/text-embedding-3-small", None).ends("a b")) == [1, 3]
assert tokenizer_for("x", sys.argv[1]).ends("a b")
print(seen, sorted({"litellm", "requests", "huggingface_hub"} & set(sys.modules)))
"""


def test_nothing_is_asked_of_the_network_and_litellm_is_not_loaded(folder: Path) -> None:
    """A program in a closed network counts at once; litellm takes seconds to import."""
    command = [sys.executable, "-c", NO_NETWORK, words_file(folder)]
    found = subprocess.check_output(command, cwd=ROOT, text=True, timeout=50)
    assert found.strip() == "[] []"


# --- A tokenizer.json --------------------------------------------------------------------------


def test_file_counts_its_words_and_what_it_puts_around_them(folder: Path) -> None:
    """[CLS] and [SEP] are part of the model's limit, not of the text."""
    path = words_file(folder)
    made = tokenizers.Tokenizer.from_file(path)
    for form in (path, Path(path)):
        tokenizer = tokenizer_for("any/model", form)
        assert tokenizer.special == 2
        for text in SAMPLES.values():
            inside = len(made.encode(text).ids) - 2
            assert len(tokenizer.ends(text)) == max(inside, 1)


def test_file_that_cuts_and_pads_does_neither_here(folder: Path) -> None:
    """Published files often cut at 512 tokens, so that no text would ever seem too long."""
    cutting = FileTokens(words_file(folder, cut=True))
    whole = FileTokens(words_file(folder))
    for text in ("one", SAMPLES["docs"]):
        assert cutting.ends(text) == whole.ends(text)


def test_two_files_have_two_names_and_one_file_has_one(folder: Path, tmp_path: Path) -> None:
    """Vectors cached under one tokenizer must not be those of another; where it lies is no part."""
    path = words_file(folder)
    twin = tmp_path / "twin.json"
    twin.write_bytes(Path(path).read_bytes())
    assert FileTokens(path).name == FileTokens(str(twin)).name
    assert FileTokens(path).name != FileTokens(bytes_file(folder)).name
    assert str(folder) not in repr(FileTokens(path))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is no Hugging Face"),
        (b"{}", "is no Hugging Face"),
        (b"not json", "is no Hugging Face"),
        (b"\xff\xfe\0", "is no Hugging Face"),
        (b'{"model": {"type": "BPE", "vocab": {}}}', "is no Hugging Face"),
    ],
)
def test_file_that_is_none_is_refused_when_it_is_named(
    tmp_path: Path, content: bytes | None, match: str
) -> None:
    """Not at the first text, perhaps an hour later."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LMConfigurationError, match=match) as caught:
        tokenizer_for("any/model", path)
    assert "tokenizer.json" in str(caught.value)


def test_folder_is_no_file(tmp_path: Path) -> None:
    """The folder of a downloaded model is an easy mistake."""
    with pytest.raises(LMConfigurationError, match="cannot be read: Is a directory"):
        tokenizer_for("any/model", tmp_path)


# --- A function, an object ---------------------------------------------------------------------


@settings(deadline=None)  # the first text loads a vocabulary
@given(text=texts, count=st.integers(0, 50))
def test_function_says_how_many_there_are(text: str, count: int) -> None:
    """Where they end is guessed; that there is none in a text is not believed."""
    found = FunctionTokens(lambda _: [7] * count).ends(text)
    assert len(found) == (max(count, 1) if text else 0)


def test_encode_of_any_library_is_such_a_function(folder: Path) -> None:
    """tiktoken gives a list, `tokenizers` an object that has a length."""
    encoding: Any = tokenizer_door.load_cl100k()
    text = SAMPLES["German"]
    for encode in (
        encoding.encode_ordinary,
        tokenizers.Tokenizer.from_file(bytes_file(folder)).encode,
    ):
        assert len(tokenizer_for("any/model", encode).ends(text)) == len(encode(text))


@pytest.mark.parametrize("answer", [5, None, "text", b"text", {"input_ids": [1, 2]}], ids=repr)
def test_function_that_gives_no_list_is_refused(answer: object) -> None:
    """A call of a `transformers` tokenizer gives a mapping, whose length is no number of tokens."""
    tokenizer = tokenizer_for("any/model", lambda _: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(LMConfigurationError, match="must give the tokens of a text as a list"):
        tokenizer.ends("text")


class Letters:
    """A tokenizer of a user's own."""

    name = "letters"
    special = 1

    def ends(self, text: str) -> Sequence[int]:
        return range(1, len(text) + 1)


def test_object_that_counts_is_taken_as_it_is() -> None:
    """Whoever knows where the tokens are can say so."""
    letters = Letters()
    assert tokenizer_for(SMALL, letters) is letters


@pytest.mark.parametrize("bad", [7, 7.5, [], {}, b"path", True], ids=repr)
def test_what_cannot_count_is_refused(bad: object) -> None:
    """The message says what can."""
    with pytest.raises(LMConfigurationError, match=r"`tokenizer` must be the path"):
        tokenizer_for("any/model", bad)  # type: ignore[arg-type]


# --- The estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SAMPLES.values(), ids=list(SAMPLES))
def test_estimate_is_not_below_openais_count(text: str) -> None:
    """A text that is taken for too short is refused or, worse, silently cut by the server."""
    guessed, counted = len(EstimatedTokens().ends(text)), len(OpenAITokens().ends(text))
    assert counted <= guessed <= 3 * counted


WORDPIECE = {
    "English": 13,
    "German": 28,
    "Dutch": 36,
    "French": 25,
    "Italian": 26,
    "Finnish": 50,
    "Polish": 35,
    "code": 31,
    "JSON": 229,
    "base64": 147,
    "Chinese": 39,
    "Japanese": 40,
    "Korean": 58,
    "Russian": 66,
    "Ukrainian": 58,
    "Bulgarian": 65,
    "Greek": 61,
    "Arabic": 55,
    "Hebrew": 56,
}
"""Tokens of the samples by the vocabulary of `all-MiniLM-L6-v2`, which is BERT's for English."""


@pytest.mark.parametrize("name", WORDPIECE)
def test_estimate_is_not_below_berts_count(name: str) -> None:
    """Of a language that it hardly knows it makes many more tokens than OpenAI's does."""
    guessed, counted = len(EstimatedTokens().ends(SAMPLES[name])), WORDPIECE[name]
    assert counted <= guessed <= 2.2 * counted


def test_estimate_is_high_for_each_kind_of_text_in_the_repository() -> None:
    """Real documentation, code and tables, whole and in parts of every size."""
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("dspylite/models/*.py")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for size in (300, 3_000, len(text)):
            part = text[:size]
            assert len(EstimatedTokens().ends(part)) >= len(OpenAITokens().ends(part)), file
