"""What lies beside a checkpoint's own weights: weights of heads and modules, the tokenizer, configs, prompts.

Heads and modules are the ones of BGE-M3 (`sparse_linear.pt` and `colbert_linear.pt`, or `heads.safetensors` with
both) and of sentence-transformers (a Dense module's folder).  Knows nothing of sums.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from retune.model.checkpoint import read_json
from retune.model.weights import (
    FLOATS,
    PICKLED,
    SINGLE,
    Tensor,
    read_pickle,
    read_safetensors,
    to_float64,
    write_safetensors,
)
from retune.runtime import log

HEADS = ("sparse_linear.pt", "colbert_linear.pt")
HEADS_FILE = "heads.safetensors"  # both, `sparse_linear.weight` and so on
# Weights in any form, a card that tells of another model, and what training leaves behind.
LEFT_OUT = (
    "README.md", ".*", "*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pth", "*.index.json",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json",
)  # fmt: skip
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def side_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{file: {name: tensor}} of heads and modules; files are relative to the folder.

    Raises:
        UserError: for a file that cannot be read.
    """
    found = _heads(folder)
    for path in _modules(folder):
        if (folder / path / SINGLE).is_file():
            found[f"{path}/{SINGLE}"] = read_safetensors(folder / path / SINGLE)
        elif (folder / path / PICKLED).is_file():
            found[f"{path}/{SINGLE}"] = read_pickle(folder / path / PICKLED)
    return found


def _heads(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{file of `HEADS`: {name: tensor}}, whichever file they lie in."""
    if not (folder / HEADS_FILE).is_file():
        return {name: read_pickle(folder / name) for name in HEADS if (folder / name).is_file()}
    found: dict[str, dict[str, Tensor]] = {}
    for whole, tensor in read_safetensors(folder / HEADS_FILE).items():
        part, name = whole.split(".", 1)
        found.setdefault(f"{part}.pt", {})[name] = tensor
    return {name: found[name] for name in HEADS if name in found}


def matched(
    models: Sequence[str], sides: Sequence[dict[str, dict[str, Tensor]]], donor: int
) -> list[dict[str, dict[str, Tensor]]]:
    """The side weights that the merged model gets: the donor's files.

    A module that only truncates vectors holds nothing that was learnt: it is copied from the donor where others have
    none. So are heads that training has drawn, where another model has none at all.
    """
    for model, mine in zip(models, sides, strict=True):
        if more := [file for file in mine if file not in sides[donor]]:
            log.warning("%s: left out, as %s has none: %s", model, models[donor], ", ".join(more))
    copied = {file for file, tensors in sides[donor].items() if _truncates(tensors)}
    found = []
    for model, mine in zip(models, sides, strict=True):
        kept = {file: tensors for file, tensors in mine.items() if file in sides[donor]}
        drawn = set() if any(file in mine for file in HEADS) else {file for file in HEADS if file in sides[donor]}
        if drawn:
            names = ", ".join(file for file in HEADS if file in drawn)
            log.info("%s and %s: in one of them only, and copied: %s", models[donor], model, names)
        found.append({file: sides[donor][file] for file in sides[donor] if file in copied | drawn} | kept)
    return found


def _truncates(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module's only weight keeps a vector's first dimensions as they are."""
    if list(tensors) != ["linear.weight"] or (weight := tensors["linear.weight"]).dtype not in FLOATS:
        return False
    values = to_float64(weight.read(0, weight.size), weight.dtype).reshape(weight.shape)
    return np.array_equal(values, np.eye(*weight.shape))


def write_side(path: Path, entries: Sequence[tuple]) -> None:
    """Write a file of side weights; entries are those of `weights.write_safetensors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".pt":
        write_safetensors(path, entries)
        return
    import torch

    state = {}
    for name, dtype, shape, pieces in entries:
        values = torch.from_numpy(np.concatenate([*pieces()]).reshape(shape))
        state[name] = values.view(torch.bfloat16) if dtype == "BF16" else values
    torch.save(state, path)


def join_heads(folder: Path) -> None:
    """Write the file with both heads beside those with one each, where there are both."""
    if all((folder / name).is_file() for name in HEADS):
        write_safetensors(
            folder / HEADS_FILE,
            [
                (f"{Path(file).stem}.{name}", tensor.dtype, tensor.shape, partial(_whole, tensor))
                for file in HEADS
                for name, tensor in read_pickle(folder / file).items()
            ],
        )


def _whole(tensor: Tensor) -> Iterator[np.ndarray]:
    yield tensor.read(0, tensor.size)


def _modules(folder: Path) -> list[str]:
    """Folders of the sentence-transformers modules, but for the model's own."""
    return [module["path"] for module in read_json(folder / "modules.json") if module["path"]]


def copy_rest(folder: Path, out: Path) -> None:
    """Copy what is no weight: files of the folder itself and of its sentence-transformers modules."""
    for path in ("", *_modules(folder)):
        (out / path).mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / path).glob("*")):
            left_out = any(fnmatch.fnmatch(file.name, pattern) for pattern in (*LEFT_OUT, *HEADS))
            if file.is_file() and not left_out:
                shutil.copyfile(file, out / path / file.name)
                if file.suffix == ".pt":
                    log.warning("%s: copied, not merged", file)


def state_dtype(config: Path, dtypes: Sequence[str]) -> None:
    """Make config.json name the kind of number that was written: transformers loads a model as what it names."""
    floats = [dtype for dtype in dtypes if dtype in FLOATS]
    wanted = DTYPES[max(dict.fromkeys(floats), key=floats.count)] if floats else None
    values = json.loads(config.read_text())
    stated = [key for key in ("dtype", "torch_dtype") if values.get(key) not in (None, wanted)]
    if wanted and stated:
        config.write_text(json.dumps(values | dict.fromkeys(stated, wanted), indent=2) + "\n")


# ---- tokenizers ---------------------------------------------------------------------------------


def compare_vocabularies(models: Sequence[str], folders: Sequence[Path], donor: int) -> None:
    """Warn of models whose tokens mean other words than the donor's do: their embeddings would be mixed up."""
    wanted = _vocabulary(folders[donor])
    for model, folder in zip(models, folders, strict=True):
        mine = wanted if folder == folders[donor] else _vocabulary(folder)
        if wanted is None or mine is None or mine == wanted:
            continue
        words = [word for word in wanted if mine.get(word) != wanted[word]] or [w for w in mine if w not in wanted]
        log.warning(
            "%s and %s: their tokenizers differ in %d tokens, such as %r; the merged model gets the latter's",
            model, models[donor], len(words), words[0],
        )  # fmt: skip


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """{token: id}; None where the folder does not hold it in a form that is known here."""
    if (folder / "tokenizer.json").is_file():
        said = read_json(folder / "tokenizer.json")
        vocabulary = said["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
            vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in said.get("added_tokens") or []}
    if (folder / "vocab.txt").is_file():
        return {word: place for place, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    return None
