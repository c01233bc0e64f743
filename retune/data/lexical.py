"""Search by words: BM25 (Robertson and Zaragoza 2009, as Lucene has it) through the library bm25s.

Words are what Unicode takes for letters, digits and marks, without case and compatibility forms
(`retune.data.text.normalise`); scripts that put no spaces between words are cut into pairs of
characters, as Lucene's CJK analyser does.  There are no stop words and there is no stemming: both
would be of one language.  Knows nothing of vectors, positives or filters.

Memory: 8 bytes for each distinct word of each text, about 25 while the index is built; texts are
streamed.
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import bm25s
import numpy as np
from bm25s.tokenization import Tokenizer

from retune import tables
from retune.data.text import normalise
from retune.runtime import progress, timed

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it would write its debugging into every log
K1, B = 1.5, 0.75  # saturation of a word's frequency, and how much the length of a text counts: bm25s' own
# Thai to Tibetan, Burmese, Khmer, kana, ideographs: written without spaces between words
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_ASCII = str.maketrans({sign: " " for sign in map(chr, range(128)) if not (sign.isalnum() or sign == "_")})
_SCRIPTS = re.compile(f"([{UNSPACED}]+)|[^{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in order; of unspaced scripts the pairs of adjacent characters."""
    if text.isascii():
        return text.lower().translate(_ASCII).split()  # what the rest gives, several times faster
    found = []
    for run in _runs().findall(normalise(text)):
        for part in _SCRIPTS.finditer(run):
            unspaced = part[1] is not None and len(part[1]) > 2
            found += map("".join, pairwise(part[1])) if unspaced else [part[0]]
    return found


@cache
def _runs() -> re.Pattern[str]:
    """Runs of letters, digits and marks: `\\w` alone would cut Hindi, Tamil or Arabic at vowel signs."""
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    return re.compile(rf"[\w{''.join(map(chr, marks))}]+")


class _Rows(Sequence):
    """The word numbers of each text as a list, out of one flat array: lists of all would take 10 times the memory."""

    def __init__(self, flat: array, ends: array) -> None:
        self._flat, self._ends = flat, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[int]:
        return self._flat[self._ends[row - 1] if row else 0 : self._ends[row]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))


def build(texts: Path) -> Lexical:
    """The index of all rows of a table of texts."""
    tokenizer = Tokenizer(lower=False, splitter=words, stopwords=None)
    flat, ends = array("i"), array("q")
    with timed("index of words"):
        with progress(tables.n_rows(texts), "read words", "texts") as bar:
            for batch in tables.batches(texts, "texts", ["text"], 4096):
                for row in tokenizer.streaming_tokenize(batch["text"].to_pylist(), allow_empty=False):
                    flat.extend(row)
                    ends.append(len(flat))
                bar.update(len(batch))
        vocabulary = tokenizer.get_vocab_dict()
        if not vocabulary:
            return Lexical(None, {}, len(ends))
        model = bm25s.BM25(k1=K1, b=B, method="lucene", csc_backend="auto")
        model.index(SimpleNamespace(ids=_Rows(flat, ends), vocab=vocabulary), False, show_progress=False)
    return Lexical(model, vocabulary, len(ends))


class Lexical:
    """BM25 scores of the texts of a table."""

    def __init__(self, model: bm25s.BM25 | None, vocabulary: dict[str, int], n_texts: int) -> None:
        """`model` is None where no text has a word."""
        self._model, self._vocabulary, self._n_texts = model, vocabulary, n_texts

    def search(self, queries: Sequence[str], k: int, only: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best texts of each query that share a word with it.

        Args:
            only: bool [n_texts]: search these texts alone.

        Returns:
            scores float32 [n, k], ids int64 [n, k]: score descending, ties by rising id; where fewer texts share a word
            with the query, the rest is -inf and -1.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            if numbers := self._numbers(query):
                found = self._model.get_scores_from_ids(numbers)  # [T]
                best = _best(found, k, only)
                scores[row, : len(best)], ids[row, : len(best)] = found[best], best
        return scores, ids

    def pair_scores(self, queries: Sequence[str], query_rows: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """BM25 scores of the pairs (query_rows[i], text_ids[i]), float32 [n], as `search` gives them; 0 where they
        share no word, -inf where a text id is below 0.

        Args:
            query_rows, text_ids: int64 [n].
        """
        scores = np.where(np.asarray(text_ids) < 0, -np.inf, 0).astype(np.float32)
        order = np.argsort(query_rows, kind="stable")
        starts = np.searchsorted(query_rows[order], np.arange(len(queries) + 1))
        for row, query in enumerate(queries):
            pairs = order[starts[row] : starts[row + 1]]
            for number in self._numbers(query) if len(pairs) else ():
                scores[pairs] += self._of_word(number, text_ids[pairs])
        return scores

    def _of_word(self, number: int, text_ids: np.ndarray) -> np.ndarray:
        """What one word adds to the scores of texts, float32 [n]."""
        index = self._model.scores  # a sparse matrix by columns: the texts of each word by rising id
        part = slice(index["indptr"][number], index["indptr"][number + 1])
        texts = index["indices"][part]
        at = np.minimum(np.searchsorted(texts, text_ids), len(texts) - 1)
        return np.where(texts[at] == text_ids, index["data"][part][at], np.float32(0))

    def _numbers(self, query: str) -> list[int]:
        return [self._vocabulary[word] for word in words(query) if word in self._vocabulary]


def _best(scores: np.ndarray, k: int, only: np.ndarray | None) -> np.ndarray:
    """Ids of the at most k highest scores above 0, score descending, then by id."""
    scores = scores if only is None else scores * only
    some = scores[::16]
    least = np.partition(some, -k)[-k] if len(some) > k else 0  # that of all texts is no lower
    ids = np.flatnonzero(scores >= least if least > 0 else scores > 0)
    if len(ids) > k:
        found = scores[ids]
        cut = np.partition(found, -k)[-k]
        above, tie = ids[found > cut], ids[found == cut]
        ids = np.concatenate([above, tie[: k - len(above)]])
    return ids[np.lexsort((ids, -scores[ids]))]
