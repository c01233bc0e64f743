"""Merge: checkpoints of one architecture → one checkpoint, the weighted sum of their weights.

A mix of the tuned model and its base keeps much of what the base knew (LM-Cocktail,
arXiv:2311.13534).  Names, shapes and kinds of all tensors are compared before any is read, then
piece after piece is summed and written: memory does not grow with the models.  No model code runs.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from retune.model import checkpoint, heads
from retune.model.weights import FLOATS, SINGLE, Tensor, finite, from_float64, tensors, to_float64, write_safetensors
from retune.runtime import UserError, atomic, log, progress

Advance = Callable[[int], object]
PIECE = 1 << 18  # elements summed at a time: 2 MiB as float64, which stays in the cache
# What one model may have and another lack: transformers writes them or not as it pleases, and no vector needs them;
# M3's heads, which training may have drawn anew.
OPTIONAL = re.compile(r"(^|\.)(pooler\..*|position_ids|token_type_ids|.*inv_freq)$|^(sparse|colbert)_linear\.")
# Weights in any form, a card that tells of another model, and what training leaves behind.
LEFT_OUT = (
    "README.md", ".*", "*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pth", "*.index.json",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "sparse_linear.pt", "colbert_linear.pt",
)  # fmt: skip


def merge(*, models: Sequence[str | Path], weights: Sequence[float], out: Path, revision: str | None = None) -> None:
    """Write the weighted sum of `models` as a checkpoint folder.

    Sums are taken in float64 and stored in the first model's kind of number.  Configuration,
    tokenizer, prompts and modules are those of the last model whose weight is not 0.  M3's heads are merged too.

    Args:
        models: folders, hub ids or `package:<python package>`.
        weights: one for each model; a model of weight 0 is compared, but not read.
        out: the folder, replaced as a whole.
        revision: of the hub ids among `models`.

    Raises:
        UserError: for models that do not fit together (all differences at once), and for sums that are not finite.
    """
    _check_weights(models, weights)
    folders = [checkpoint.resolve(model, revision) for model in models]
    found = [tensors(folder) for folder in folders]
    donor = max(index for index, weight in enumerate(weights) if weight)
    named = [_with_names_of(found[donor], mine, str(name)) for mine, name in zip(found, models, strict=True)]
    named = [mine | heads.stored(folder) for mine, folder in zip(named, folders, strict=True)]
    _compare([str(model) for model in models], named, donor)

    mixed = [(mine, weight) for mine, weight in zip(named, weights, strict=True) if weight]
    names = list(dict.fromkeys(name for mine, _ in mixed for name in mine))
    with atomic(out) as part:
        _copy_rest(folders[donor], part)
        with progress(sum(_first(mixed, name).size for name in names), "merge", "weights") as bar:
            backbone = [name for name in names if name.split(".")[0] not in heads.PARTS]
            write_safetensors(part / SINGLE, [_entry(name, mixed, bar.update) for name in backbone])
            if len(backbone) < len(names):
                own = [name for name in names if name not in backbone]
                write_safetensors(part / heads.FILE, [_entry(name, mixed, bar.update) for name in own])
                heads.write(part, heads.read(part))
        _state_dtype(part / "config.json", [_first(mixed, name).dtype for name in backbone])
    log.info("merged %d tensors of %s", len(names), ", ".join(_shares(models, weights)))


def _check_weights(models: Sequence[str | Path], weights: Sequence[float]) -> None:
    if len(models) != len(weights):
        raise UserError(f"merge.weights: expected one weight a model, found {len(weights)} for {len(models)}")
    if not any(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"merge.weights: expected finite numbers, not all 0, found {list(weights)}")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        log.warning("merge.weights: they sum to %g, not to 1", sum(weights))


def _shares(models: Sequence[str | Path], weights: Sequence[float]) -> list[str]:
    return [f"{weight:g} × {model}" for model, weight in zip(models, weights, strict=True)]


def _first(mixed: Sequence[tuple[dict[str, Tensor], float]], name: str) -> Tensor:
    return next(mine[name] for mine, _ in mixed if name in mine)


# ---- do they fit together? ----------------------------------------------------------------------


def _with_names_of(wanted: dict[str, Tensor], mine: dict[str, Tensor], model: str) -> dict[str, Tensor]:
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
        log.info("%s: left out, beside the backbone: %s", model, _some(dropped))
    return best


def _compare(models: Sequence[str], named: Sequence[dict[str, Tensor]], donor: int) -> None:
    """Raise one UserError with every difference; log those that do not matter."""
    problems: list[str] = []
    wanted = named[donor]
    for model, mine in zip(models, named, strict=True):
        missing = [name for name in wanted if name not in mine]
        more = [name for name in mine if name not in wanted]
        if optional := [name for name in missing + more if OPTIONAL.search(name)]:
            log.info("%s and %s: in one of them only, and copied: %s", models[donor], model, _some(optional))
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- the sum ------------------------------------------------------------------------------------


def _entry(name: str, mixed: Sequence[tuple[dict[str, Tensor], float]], advance: Advance) -> tuple:
    parts = [(mine[name], weight) for mine, weight in mixed if name in mine]
    first = parts[0][0]
    alone = len(parts) < len(mixed) or [weight for _, weight in mixed] == [1]
    if alone or first.dtype not in FLOATS:
        return name, first.dtype, first.shape, partial(_copied, name, [tensor for tensor, _ in parts], advance)
    return name, first.dtype, first.shape, partial(_summed, name, parts, advance)


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
        total = np.zeros(stop - start)
        for tensor, weight in parts:
            total += weight * to_float64(tensor.read(start, stop), tensor.dtype)
        bits = from_float64(total, dtype)
        if not (np.isfinite(total).all() and finite(bits, dtype)):
            raise UserError(
                f"merge: {name}: the sum is not finite in {dtype}; a model holds NaN, or weights are too big"
            )
        yield bits
        advance(stop - start)


# ---- the rest of the folder ---------------------------------------------------------------------


def _copy_rest(folder: Path, out: Path) -> None:
    """Copy what is no weight: files of the folder itself and of its sentence-transformers modules."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text()) if listed.is_file() else []
    paths = [module["path"] for module in modules if module["path"]]
    for path in ("", *paths):
        (out / path).mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / path).glob("*")):
            left_out = any(fnmatch.fnmatch(file.name, pattern) for pattern in LEFT_OUT)
            if path and left_out and file.suffix in (".safetensors", ".bin"):
                raise UserError(f"merge: {file}: a module with weights of its own is not supported")
            if file.is_file() and not left_out:
                shutil.copyfile(file, out / path / file.name)
                if file.suffix == ".pt":
                    log.warning("%s: copied, not merged", file)


def _state_dtype(config: Path, dtypes: Sequence[str]) -> None:
    """Make config.json name the kind of number that was written: transformers loads a model as what it names."""
    floats = [dtype for dtype in dtypes if dtype in FLOATS]
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    wanted = names[max(dict.fromkeys(floats), key=floats.count)] if floats else None
    values = json.loads(config.read_text())
    stated = [key for key in ("dtype", "torch_dtype") if values.get(key) not in (None, wanted)]
    if wanted and stated:
        config.write_text(json.dumps(values | dict.fromkeys(stated, wanted), indent=2) + "\n")
