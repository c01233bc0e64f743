"""Tensors of several models → tensors of one: do they fit together, and their weighted sum, piece by piece.

Names, shapes and kinds are compared before any element is read; sums are taken in float64 and stored in
the first model's kind of number.  Knows nothing of folders.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from retune.model.weights import FLOATS, Tensor, finite, from_float64, to_float64
from retune.runtime import UserError, log

Advance = Callable[[int], object]
PIECE = 1 << 18  # elements summed at a time: 2 MiB as float64, which stays in the cache
# What one model may have and another lack: transformers writes them or not as it pleases, and no vector needs them.
OPTIONAL = re.compile(r"(^|\.)(pooler\..*|position_ids|token_type_ids|.*inv_freq)$")
CLASSIFIER = re.compile(r"^(classifier|score)\.")  # beside one, a pooler is a part of the score
LM_HEAD = "lm_head.weight"
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")


# ---- do they fit together? ----------------------------------------------------------------------


def with_names_of(wanted: dict[str, Tensor], mine: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """`mine` under the names in `wanted`: a backbone saved beneath a task's head has a prefix (`bert.`), alone none."""
    if not wanted or not mine or wanted.keys() == mine.keys():
        return mine
    probe = next((name for name in wanted if not OPTIONAL.search(name)), next(iter(wanted)))
    longer = {name.removesuffix(probe) for name in mine if name.endswith("." + probe)}
    probe = next((name for name in mine if not OPTIONAL.search(name)), next(iter(mine)))
    shorter = {name.removesuffix(probe) for name in wanted if name.endswith("." + probe)}
    options = [mine]
    for prefix in sorted(longer):
        # what lies beside the backbone is the head of a task that the merged model does not have
        options.append({name.removeprefix(prefix): mine[name] for name in mine if name.startswith(prefix)})
    options += [{prefix + name: tensor for name, tensor in mine.items()} for prefix in sorted(shorter)]
    best = max(options, key=lambda option: len(option.keys() & wanted.keys()))
    if len(best) < len(mine):
        kept = {id(tensor) for tensor in best.values()}
        dropped = [name for name, tensor in mine.items() if id(tensor) not in kept]
        log.info("%s: left out, beside the backbone: %s", model, some(dropped))
    return best


def tied(found: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same tensors, without output heads that are copies of the embeddings, where not all have a head.

    A language model whose head is tied to its embeddings reads its words off these; another checkpoint of it may
    hold the copy.  A head that is none stays, for `compare` to tell.
    """
    with_head = [mine for mine in found if LM_HEAD in mine]
    if len(with_head) in (0, len(found)) or not all(map(_embeddings, with_head)):
        return list(found)
    if not all(_equal(mine[LM_HEAD], mine[_embeddings(mine)]) for mine in with_head):
        return list(found)
    return [{name: tensor for name, tensor in mine.items() if name != LM_HEAD} for mine in found]


def _embeddings(mine: dict[str, Tensor]) -> str | None:
    return next((name for name in mine if EMBEDDINGS.search(name)), None)


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(one.read(*span), other.read(*span)) for span in _spans(one.size))


def compare(models: Sequence[str], named: Sequence[dict[str, Tensor]], donor: int) -> None:
    """Log differences that do not matter.

    Args:
        models: names, for messages. named: the tensors of each. donor: the model that the others are compared with.

    Raises:
        UserError: with every difference that matters.
    """
    problems: list[str] = []
    wanted = named[donor]
    scored = any(CLASSIFIER.search(name) for name in wanted)
    for model, mine in zip(models, named, strict=True):
        missing = [name for name in wanted if name not in mine]
        more = [name for name in mine if name not in wanted]
        optional = [name for name in missing + more if OPTIONAL.search(name) and not (scored and "pooler." in name)]
        if optional:
            log.info("%s and %s: in one of them only, and copied: %s", models[donor], model, some(optional))
        problems += [f"{name}: not in {model}" for name in missing if name not in optional]
        problems += [f"{name}: in {model}, but not in {models[donor]}" for name in more if name not in optional]
        converted = False
        for name in (name for name in wanted if name in mine):
            a, b = wanted[name], mine[name]
            if a.shape != b.shape:
                problems.append(f"{name}: {list(b.shape)} in {model}, {list(a.shape)} in {models[donor]}")
            elif a.dtype != b.dtype:
                converted = converted or (a.dtype in FLOATS and b.dtype in FLOATS)
                if a.dtype not in FLOATS or b.dtype not in FLOATS:
                    problems.append(f"{name}: {b.dtype} in {model}, {a.dtype} in {models[donor]}")
        if converted:
            log.info("%s and %s are of different precision; the first model's is kept", model, models[donor])
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        rest = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"merge: the models do not fit together: {len(problems)} differences\n{shown}{rest}")


def some(names: Sequence[str]) -> str:
    """The first four names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- the sum ------------------------------------------------------------------------------------


def first(mixed: Sequence[tuple[dict[str, Tensor], float]], name: str) -> Tensor:
    """The tensor of that name in the first model that has it."""
    return next(mine[name] for mine, _ in mixed if name in mine)


def entry(name: str, mixed: Sequence[tuple[dict[str, Tensor], float]], advance: Advance) -> tuple:
    """(name, dtype, shape, pieces) of a tensor of the mixture, as `weights.write_safetensors` wants it.

    Args:
        mixed: (tensors, weight) of each model. advance: told of the elements that are done.
    """
    parts = [(mine[name], weight) for mine, weight in mixed if name in mine]
    lead = parts[0][0]
    alone = len(parts) < len(mixed) or [weight for _, weight in mixed] == [1]
    if alone or lead.dtype not in FLOATS:
        return name, lead.dtype, lead.shape, partial(_copied, name, [tensor for tensor, _ in parts], advance)
    return name, lead.dtype, lead.shape, partial(_summed, name, parts, advance)


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([*range(0, size, PIECE), size])


def _copied(name: str, parts: Sequence[Tensor], advance: Advance) -> Iterator[np.ndarray]:
    """The first model's bits; integers must be equal in all, or they are quantised weights and no buffer."""
    for start, stop in _spans(parts[0].size):
        bits = parts[0].read(start, stop)
        for other in parts[1:]:
            if parts[0].dtype not in FLOATS and not np.array_equal(bits, other.read(start, stop)):
                raise UserError(f"merge: {name}: integers that differ between the models cannot be merged")
        yield bits
        advance(stop - start)


def _summed(name: str, parts: Sequence[tuple[Tensor, float]], advance: Advance) -> Iterator[np.ndarray]:
    dtype = parts[0][0].dtype
    for start, stop in _spans(parts[0][0].size):
        total = np.full(stop - start, -0.0)  # so that −0 stays what it is
        for tensor, weight in parts:
            total += weight * to_float64(tensor.read(start, stop), tensor.dtype)
        bits = from_float64(total, dtype)
        if not (np.isfinite(total).all() and finite(bits, dtype)):
            raise UserError(
                f"merge: {name}: the sum is not finite in {dtype}; a model holds NaN, or weights are too big"
            )
        yield bits
        advance(stop - start)
