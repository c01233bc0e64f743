"""When two texts are the same: exactly (`digest`) and but for their writing (`normalise`).

Knows nothing of files or tables.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable


def digest(text: str) -> bytes:
    """16 bytes that stand for `text`: a dictionary of digests is bounded, one of texts is not.

    Raises:
        UnicodeEncodeError: for a lone surrogate, which no file format of ours can hold.
    """
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def digests(texts: Iterable[str]) -> list[bytes]:
    """`digest` of each, faster for many."""
    blake2b = hashlib.blake2b
    return [blake2b(text.encode(), digest_size=16).digest() for text in texts]


def normalise(text: str) -> str:
    """`text` without case, compatibility forms (full width, ligatures) and runs of white space.

    Texts that are equal so are the same query or passage to a reader.  The result is stable:
    normalising it again changes nothing.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    # Folding can undo the normal form and the other way round, so go round until nothing moves
    # (Unicode standard, section 3.13, asks for up to three rounds).
    while (folded := unicodedata.normalize("NFKC", text).casefold()) != text:
        text = folded
    return " ".join(text.split())


def shown(text: str, width: int = 60) -> str:
    """`text` in quotation marks on one line, cut for a message."""
    line = " ".join(text[: 4 * width].split())
    return f'"{line}"' if len(line) <= width else f'"{line[: width - 1]}…"'
