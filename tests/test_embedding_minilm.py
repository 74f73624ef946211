"""`Embedder` with a model that understands: all-MiniLM-L6-v2 behind a real embeddings server.

Not here: the model (`minilm.py`), and what servers do wrong (`test_embedding_traps.py`).
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastapi
import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import ContextWindowExceededError
from dspylite.models.embedding.tokens import tokenizer_for
from tests.minilm import (
    DIMENSIONS,
    INSTALL,
    MAX_TOKENS,
    Floats,
    Vectors,
    package_folder,
    read_tokenizer,
    served_by_a_process,
)
from tests.serving import served
from tests.test_embedding_tokens import SAMPLES


def _folder() -> Path:
    folder = package_folder()
    if folder is None:
        pytest.skip(
            f"the weights of a real model are not installed; `{INSTALL}` brings them",
            allow_module_level=True,
        )
    return folder


FOLDER = _folder()
VOCABULARY = FOLDER / "tokenizer.json"
TOKENIZER = read_tokenizer(VOCABULARY)

# Cosines that sentence-transformers' documentation gives for this model ("Semantic Textual
# Similarity" and "Quickstart"), rounded as they are there.
PUBLISHED = {
    ("The new movie is awesome", "The dog plays in the garden"): 0.0543,
    ("The new movie is awesome", "The new movie is so great"): 0.8939,
    ("The new movie is awesome", "A woman watches TV"): -0.0502,
    ("The cat sits outside", "The dog plays in the garden"): 0.2838,
    ("The cat sits outside", "The new movie is so great"): -0.0029,
    ("The cat sits outside", "A woman watches TV"): 0.1310,
    ("A man is playing guitar", "The dog plays in the garden"): 0.2277,
    ("A man is playing guitar", "The new movie is so great"): -0.0136,
    ("A man is playing guitar", "A woman watches TV"): -0.0327,
    ("The weather is lovely today.", "It's so sunny outside!"): 0.6660,
    ("The weather is lovely today.", "He drove to the stadium."): 0.1046,
    ("It's so sunny outside!", "He drove to the stadium."): 0.1411,
}

PARAPHRASES = (
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("How do I reset my password?", "What must I do to change a forgotten password?"),
    ("The cat sat on the mat.", "A cat was sitting on a mat."),
    ("It is raining heavily in London today.", "There is heavy rain in London today."),
    (
        "You should drink plenty of water every day.",
        "It is important to drink a lot of water each day.",
    ),
    ("The museum is closed on Mondays.", "On Mondays the museum does not open."),
    ("He bought a new car last week.", "Last week he purchased a new automobile."),
    (
        "The doctor told her to rest for a week.",
        "She was advised by her physician to take a week of rest.",
    ),
)
# They say the same with few words in common; the model itself sees less likeness.
FREE_PARAPHRASES = (
    (
        "The company's profits rose sharply last year.",
        "Last year the firm earned much more than before.",
    ),
    (
        "The train to Berlin leaves at nine in the morning.",
        "At 9 a.m. the train for Berlin departs.",
    ),
    (
        "Scientists discovered a new planet outside the solar system.",
        "Astronomers have found a previously unknown exoplanet.",
    ),
    ("Children are playing football in the park.", "Kids play soccer in a park."),
)

PASSAGES = (
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Danube flows through ten countries before it reaches the Black Sea.",
    "A mutex lets only one thread at a time enter a critical section.",
    "Penicillin was discovered by Alexander Fleming in 1928.",
    "Bees tell each other where nectar is by dancing in the hive.",
    "The violin has four strings, which are tuned in fifths.",
    "Tenants must give three months' notice before they move out.",
    "Mount Everest, at 8,849 metres, is the highest mountain above sea level.",
    "A total solar eclipse happens when the moon covers the sun completely.",
    "The French Revolution began with the storming of the Bastille in 1789.",
    "Photosynthesis makes sugar from light, water and carbon dioxide.",
    "A goalkeeper may touch the ball with his hands inside the penalty area.",
    "Inflation lowers what a given amount of money can buy.",
    "Tides follow mainly from the pull of the moon on the oceans.",
    "A balanced binary tree finds a key in logarithmic time.",
    "Sourdough needs a starter that is fed with flour and water each day.",
    "The heart of an adult beats about seventy times a minute at rest.",
    "Vermeer painted the Girl with a Pearl Earring around 1665.",
    "Camels store fat, not water, in their humps.",
    "Steel is iron with a little carbon, which makes it harder.",
    "The Great Barrier Reef lies off the coast of Queensland.",
    "A passport must be valid for six months beyond the date of entry.",
    "Chess players may castle only if neither king nor rook has moved.",
    "Vaccines train the immune system without causing the disease.",
    "Garbage collection frees memory that a program no longer reaches.",
    "Coffee was first cultivated in Ethiopia and Yemen.",
    "The Magna Carta limited the power of the English king in 1215.",
    "Lithium batteries lose capacity faster when they are kept hot.",
    "Penguins live almost only in the southern hemisphere.",
    "A sonnet has fourteen lines, often in iambic pentameter.",
)
# The query, and how the passage begins. Few of their words are in the passage.
QUERIES = {
    "Who found the first antibiotic?": "Penicillin",
    "How can I stop two workers from changing shared state simultaneously?": "A mutex",
    "insects communicating the location of flowers": "Bees",
    "I want to leave my rented flat. How early do I have to tell my landlord?": "Tenants",
    "Why does the sea rise and fall twice a day?": "Tides",
    "tallest peak on Earth": "Mount Everest",
    "What happens to savings when prices go up?": "Inflation",
    "Do I need to renew my travel document before flying abroad?": "A passport",
    "automatic reclaiming of unused objects on the heap": "Garbage collection",
    "How do plants feed themselves?": "Photosynthesis",
    "Dutch Golden Age portrait of a young woman": "Vermeer",
    "a poem's form": "A sonnet",
    "normal pulse": "The heart",
    "Where do antarctic birds that cannot fly come from?": "Penguins",
}
# In many scripts, but not the one of blanks: this model sees no token there, and we see one.
SHORT = {name: text for name, text in SAMPLES.items() if text.strip() and len(text) < 140}


@dataclass(frozen=True)
class Server:
    """What a server does around the model; what it was asked is kept for the tests to judge.

    Attributes:
        asked: The bodies of all requests.
        lengths: For each text, how many tokens it had before the end was cut off.
    """

    vectors: Vectors
    asked: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer as OpenAI's server does, but the rows come as they were ready: last one first."""
        texts = body["input"]
        lengths = [count(text) for text in texts]
        self.asked.append(body)
        self.lengths.extend(lengths)
        rows = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(map(_sent(body), self.vectors(texts)))
        ]
        used = sum(min(length, MAX_TOKENS) for length in lengths)
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"object": "list", "model": body["model"], "data": rows[::-1], "usage": usage}


def count(text: str) -> int:
    """Count the model's tokens of a text, with the two around it, and nothing cut off."""
    return len(TOKENIZER.encode(text).ids)


def _sent(body: dict[str, Any]) -> Callable[[Any], Any]:
    if body.get("encoding_format") == "base64":
        return lambda vector: base64.b64encode(vector.tobytes()).decode()
    return lambda vector: vector.tolist()


@pytest.fixture(scope="module")
def vectors() -> Iterator[Vectors]:
    with served_by_a_process(FOLDER) as answer:
        yield answer


@pytest.fixture(scope="module")
def alone(vectors: Vectors) -> dict[str, Floats]:
    """Give the vectors of texts of all lengths and scripts, each embedded by itself."""
    return {text: vectors([text])[0] for text in (*SHORT.values(), *PASSAGES)}


@pytest.fixture(scope="module")
def started(vectors: Vectors) -> Iterator[tuple[Server, str]]:
    server = Server(vectors)
    app = fastapi.FastAPI()
    app.post("/v1/embeddings")(server.answer)  # in a thread of its own, as the model takes time
    with served(app) as port:
        yield server, f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def server(started: tuple[Server, str]) -> Server:
    started[0].asked.clear()
    started[0].lengths.clear()
    return started[0]


@pytest.fixture
def embedder_with(started: tuple[Server, str]) -> Callable[..., dspy.Embedder]:
    """Give a test `embedder_with(**options)`."""
    address = started[1]

    def made(**options: Any) -> dspy.Embedder:
        return dspy.Embedder("openai/all-MiniLM-L6-v2", api_base=address, api_key="k", **options)

    return made


def cosines(block: dspy.EmbeddingMatrix) -> Floats:
    rows = np.asarray(block)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near: Floats = rows @ rows.T
    return near


def long_texts() -> tuple[str, str]:
    """Make two texts that are the same for as long as the model reads, and different behind."""
    head = " ".join(PASSAGES[:20])
    assert MAX_TOKENS < count(head) < 2 * MAX_TOKENS
    tails = (" ".join(2 * PASSAGES[20:25]), "How long to cook rice, eggs and vegetables. " * 20)
    return f"{head} {tails[0]}", f"{head} {tails[1]}"


# --- The model -----------------------------------------------------------------------------------


def test_cosines_are_those_that_the_makers_of_the_model_publish(
    embedder_with: Callable[..., dspy.Embedder], engine: str
) -> None:
    """What follows is about the real model only if these weights, read here, are its own."""
    near = cosines(embedder_with().embed(list(itertools.chain(*PUBLISHED))))
    found = {pair: near[2 * i, 2 * i + 1] for i, pair in enumerate(PUBLISHED)}
    assert found == pytest.approx(PUBLISHED, abs=6e-5)  # half of the last digit, and some noise


def test_a_vector_does_not_depend_on_the_texts_beside_it(
    vectors: Vectors, alone: dict[str, Floats]
) -> None:
    """The model reads a batch as one row of tokens, in which no text may see another."""
    texts = [*alone, *reversed(alone)]
    together = vectors(texts)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert (together * together[::-1]).sum(1) == pytest.approx(1, abs=1e-5)
    assert np.abs(together - np.stack([alone[text] for text in texts])).max() < 1e-5


# --- Meaning -------------------------------------------------------------------------------------


def test_texts_are_as_near_as_their_meanings(
    embedder_with: Callable[..., dspy.Embedder], server: Server, engine: str
) -> None:
    """Each text beside its paraphrase, and beside all others, which are about something else."""
    pairs = PARAPHRASES + FREE_PARAPHRASES
    near = cosines(embedder_with().embed(list(itertools.chain(*pairs))))
    own = [near[2 * i, 2 * i + 1] for i in range(len(pairs))]
    assert min(own[: len(PARAPHRASES)]) > 0.8
    assert min(own[len(PARAPHRASES) :]) > 0.5
    others = [
        near[a, b] for a, b in itertools.combinations(range(len(near)), 2) if a // 2 != b // 2
    ]
    assert len(others) == 264
    assert max(others) < 0.3
    # Each engine asks for vectors in a form of its own, so that both forms were read here.
    form = server.asked[0].get("encoding_format", "float")
    assert form == {"direct": "base64", "litellm": "float"}[engine]


def test_the_right_passage_is_found(embedder_with: Callable[..., dspy.Embedder]) -> None:
    """A question seldom has the words of its answer."""
    search = dspy.Embeddings(list(PASSAGES), embedder_with(batch_size=8), k=3)
    found = {query: search(query).passages[0] for query in QUERIES}
    missed = {
        query: found[query] for query in QUERIES if not found[query].startswith(QUERIES[query])
    }
    assert missed == {}


# --- Order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_batches_give_the_rows_of_the_model_in_order(
    batch_size: int,
    embedder_with: Callable[..., dspy.Embedder],
    server: Server,
    alone: dict[str, Floats],
) -> None:
    """Texts of all lengths, each of which comes twice and is sent once."""
    samples = [*alone, *reversed(alone)]
    got = np.asarray(embedder_with(batch_size=batch_size).embed(samples))
    assert np.abs(got - np.stack([alone[text] for text in samples])).max() < 1e-5
    assert sum(len(body["input"]) for body in server.asked) == len(alone)
    assert len(server.asked) == -(-len(alone) // batch_size)


# --- Length --------------------------------------------------------------------------------------


def test_a_server_that_cuts_long_texts_makes_different_ones_equal(
    embedder_with: Callable[..., dspy.Embedder], server: Server
) -> None:
    """This is what `max_tokens` is there for: nothing tells that the ends were never read."""
    block = np.asarray(embedder_with().embed(list(long_texts())))
    assert min(server.lengths) > MAX_TOKENS
    assert np.abs(block[0] - block[1]).max() < 1e-6


def test_pooled_parts_tell_long_texts_apart(
    embedder_with: Callable[..., dspy.Embedder], server: Server
) -> None:
    """Each part is read to its end, so the tails count."""
    embedder = embedder_with(max_tokens=MAX_TOKENS, overflow="pool", tokenizer=VOCABULARY)
    assert cosines(embedder.embed(list(long_texts())))[0, 1] < 0.99
    assert max(server.lengths) <= MAX_TOKENS
    assert len(server.lengths) > 2


def test_truncating_here_reads_as_much_as_the_server_would(
    embedder_with: Callable[..., dspy.Embedder], server: Server
) -> None:
    """Neither a token too many, which would be lost, nor one too few."""
    here = embedder_with(max_tokens=MAX_TOKENS, overflow="truncate", tokenizer=VOCABULARY)
    texts = [
        *long_texts(),
        *(SAMPLES[name] * 20 for name in ("German", "code", "Chinese")),
    ]
    got = np.asarray(here.embed(texts))
    assert max(server.lengths) == MAX_TOKENS
    there = np.concatenate([server.vectors([text]) for text in texts])
    assert np.abs(got - there).max() < 1e-5


def test_a_text_is_too_long_from_one_token_more_than_the_model_reads(
    embedder_with: Callable[..., dspy.Embedder], server: Server
) -> None:
    """The two tokens that the model puts around a text are counted."""
    embedder = embedder_with(max_tokens=MAX_TOKENS, tokenizer=VOCABULARY)
    assert embedder.embed(["word " * (MAX_TOKENS - 2)]).shape == (1, DIMENSIONS)
    assert server.lengths == [MAX_TOKENS]
    with pytest.raises(ContextWindowExceededError, match=r"255 tokens.*room for 254"):
        embedder.embed(["word " * (MAX_TOKENS - 1)])
    assert len(server.lengths) == 1


def test_the_estimate_lets_no_text_through_that_the_server_would_cut(
    embedder_with: Callable[..., dspy.Embedder], server: Server
) -> None:
    """Of what this model was trained to read: of German or Russian it makes more, small tokens."""
    samples = [" ".join([SAMPLES[name]] * 20) for name in ("English", "code", "JSON")]
    embedder_with(max_tokens=MAX_TOKENS, overflow="pool").embed([*samples, " ".join(PASSAGES)])
    assert len(server.lengths) > len(samples) + 1
    assert MAX_TOKENS / 2 < max(server.lengths) <= MAX_TOKENS


# --- Tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHORT, "JSON", "base64", "docs"])
def test_tokens_are_counted_as_the_model_does(name: str) -> None:
    """The file says to cut and to pad at 128 tokens, which would make all texts equally long."""
    sample = SAMPLES[name]
    own = tokenizer_for("openai/all-MiniLM-L6-v2", VOCABULARY)
    assert len(own.ends(sample)) + own.special == count(sample)


def test_chunks_fit_the_model(embedder_with: Callable[..., dspy.Embedder], server: Server) -> None:
    """`split` counts as the model does, so a chunk fills its room and is never cut."""
    text = " ".join(PASSAGES * 3)
    chunks = embedder_with(tokenizer=VOCABULARY).split(text, max_tokens=62)
    lengths = [count(chunk) for chunk in chunks]
    assert max(lengths) <= 64
    assert len(chunks) < 1.5 * count(text) / 62
    assert " ".join(chunks) == text
