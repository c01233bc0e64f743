"""How many tokens texts have, and the length bins that they fall into.

Needs the tokenizer of a checkpoint, never its model.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from retune.model.checkpoint import resolve, tokenizer
from retune.runtime import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KNOWN_WORDS = 1_000_000  # remembered at most

Count = Callable[[pa.Array], np.ndarray]  # texts [n] → tokens int32 [n]


def counter(embedder: Mapping[str, Any], threads: int) -> Count:
    """A function from texts to their numbers of tokens, special tokens included, nothing cut off.

    Args:
        embedder: `model`, and where given `revision`, `tokenizer_name` and `trust_remote_code`.
        threads: read when the first text of this process is tokenized.

    Raises:
        UserError: if there is no such model, or it has no tokenizer that can be read.
    """
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    other = embedder.get("tokenizer_name")
    folder = tokenizer(other) if other else resolve(embedder["model"], embedder.get("revision"), adapters_alone=True)
    if (folder / "tokenizer.json").is_file():
        return _rust_counter(folder)
    return _python_counter(folder, bool(embedder.get("trust_remote_code")))


def _rust_counter(folder: Path) -> Count:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library has no kinds of its own
        raise UserError(f"model {folder}: tokenizer.json cannot be read ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return by_words(tokenizer) if tokenizes_by_words(folder) else by_texts(tokenizer)


def by_texts(tokenizer: Tokenizer) -> Count:
    """Count by tokenizing each text whole: right for every tokenizer."""

    def count(texts: pa.Array) -> np.ndarray:
        found = tokenizer.encode_batch_fast(texts.to_pylist())
        return np.fromiter(map(len, found), np.int32, len(found))

    return count


def by_words(tokenizer: Tokenizer) -> Count:
    """Count by tokenizing each distinct word once: the same numbers where `tokenizes_by_words`, many times faster."""
    known: dict[str, int] = {}
    special = tokenizer.num_special_tokens_to_add(is_pair=False)

    def count(texts: pa.Array) -> np.ndarray:
        split = [text.split(" ") for text in texts.to_pylist()]
        if len(known) > KNOWN_WORDS:
            known.clear()
        new = [word for word in dict.fromkeys(itertools.chain.from_iterable(split)) if word not in known]
        known.update(zip(new, map(len, tokenizer.encode_batch_fast(new, add_special_tokens=False)), strict=True))
        tokens = known.__getitem__
        return np.fromiter((sum(map(tokens, words)) + special for words in split), np.int32, len(split))

    return count


def tokenizes_by_words(folder: Path) -> bool:
    """Whether a text's tokens are those of its words, one after the other, words being what blanks part.

    So it is for BERT's tokenizer, whose every step (clean, fold, split at white space and
    punctuation, look up pieces) stops at a blank.  A sentencepiece or byte-level one sees the blanks.
    """
    found = json.loads((folder / "tokenizer.json").read_bytes())
    kinds = [(found.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    added = [token["content"] for token in found.get("added_tokens") or []]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(" " in token for token in added)


def _python_counter(folder: Path, trust_remote_code: bool) -> Count:
    from retune.model.backbone import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code)

    def count(texts: pa.Array) -> np.ndarray:
        found = tokenizer(texts.to_pylist(), truncation=False, verbose=False)["input_ids"]
        return np.fromiter(map(len, found), np.int32, len(found))

    return count


def bin_names(lower_bounds: Sequence[int]) -> list[str]:
    """Names such as `len-0-500`, the last one open (`len-7000-inf`); bins start at 0 whatever the first bound."""
    bounds = list(lower_bounds) if lower_bounds[0] == 0 else [0, *lower_bounds]
    return [f"len-{low}-{high}" for low, high in zip(bounds, [*bounds[1:], "inf"], strict=True)]


def bin_of(lengths: np.ndarray, lower_bounds: Sequence[int]) -> np.ndarray:
    """Index into `bin_names` of each length; a bin holds its lower bound and not its upper."""
    bounds = list(lower_bounds) if lower_bounds[0] == 0 else [0, *lower_bounds]
    return np.searchsorted(bounds, lengths, side="right") - 1
