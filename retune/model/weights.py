"""A checkpoint's weights, read and written in pieces, so that memory does not grow with the model.

safetensors is a length, a JSON header and raw data (https://github.com/huggingface/safetensors#format).
Its own `save_file` wants every tensor in memory, and a mapped file counts as memory of the process;
pieces read and written in turn need neither.  Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from retune.model.checkpoint import read_json
from retune.runtime import UserError

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_SHARDS = "pytorch_model.bin", "pytorch_model.bin.index.json"
# safetensors' name of a kind of number → how its bits are held here; numpy has no bfloat16
STORED = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its kind and shape are known, its elements are read on demand."""

    dtype: str
    """safetensors' name, one of `STORED`."""
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    """(start, stop), counted in elements of the flattened tensor → their bits, of `STORED[dtype]`."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder by name; only headers are read.

    Reads one safetensors file or shards of them, and pytorch_model.bin where there is neither.

    Raises:
        UserError: if the folder holds no weights, or a file that is truncated or of an unknown kind.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if (folder / SHARDED).is_file():
        return _shards(folder, SHARDED, _header)
    if (folder / PICKLED).is_file():
        return _pickled(folder / PICKLED)
    if (folder / PICKLED_SHARDS).is_file():
        return _shards(folder, PICKLED_SHARDS, _pickled)
    adapter = " (an adapter alone: fold it into its base first)" if (folder / "adapter_config.json").is_file() else ""
    raise UserError(f"model {folder}: no {SINGLE}, {SHARDED} or {PICKLED}{adapter}")


def of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, safetensors or pickled; see `tensors`."""
    return _header(path) if path.suffix == ".safetensors" else _pickled(path)


def _shards(folder: Path, index: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    placed = read_json(folder / index).get("weight_map", {})
    files = {name: read(folder / name) for name in dict.fromkeys(placed.values())}
    for name, file in placed.items():
        if name not in files[file]:
            raise UserError(f"{folder / index}: tensor {name} is not in {file}")
    return {name: files[file][name] for name, file in placed.items()}


def _header(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if length + 8 > total:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != total:
            raise ValueError(f"expected {8 + length + end} bytes, found {total}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    found = {}
    for name, entry in header.items():
        dtype = entry["dtype"]
        if dtype not in STORED:
            raise UserError(f"{path}: tensor {name} is of kind {dtype}; expected one of {', '.join(STORED)}")
        read = partial(_read, path, STORED[dtype], 8 + length + entry["data_offsets"][0])
        found[name] = Tensor(dtype, tuple(entry["shape"]), read)
    return found


def _read(path: Path, stored: str, offset: int, start: int, stop: int) -> np.ndarray:
    kind = np.dtype(stored)
    return np.fromfile(path, kind, stop - start, offset=offset + start * kind.itemsize)


def _pickled(path: Path) -> dict[str, Tensor]:
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    try:
        # files of before torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises whatever unpickling raised
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None
    found = {}
    for name, tensor in state.items():
        if tensor.dtype not in names:
            raise UserError(f"{path}: tensor {name} is of kind {tensor.dtype}; expected one of {', '.join(STORED)}")
        dtype = names[tensor.dtype]
        bits = tensor.view(torch.uint16) if dtype == "BF16" else tensor
        found[name] = Tensor(dtype, tuple(tensor.shape), partial(_slice, bits.reshape(-1).numpy()))
    return found


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _slice(values: np.ndarray, start: int, stop: int) -> np.ndarray:
    return values[start:stop]


def to_float64(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits of a floating `dtype` as float64, exactly."""
    if dtype == "BF16":  # the upper half of a float32
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


def from_float64(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 as stored bits of a floating `dtype`, rounded to the nearest (ties to even); NaN is not expected."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(STORED[dtype])
        bits = values.astype(np.float32).view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype("<u2")


def finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether stored bits of a floating `dtype` hold neither NaN nor infinity."""
    return bool(((bits & 0x7F80) != 0x7F80).all() if dtype == "BF16" else np.isfinite(bits).all())


def write_safetensors(
    path: Path, entries: Sequence[tuple[str, str, tuple[int, ...], Callable[[], Iterator[np.ndarray]]]]
) -> None:
    """Write a safetensors file piece by piece.

    Args:
        path: the file; it is not written atomically.
        entries: (name, dtype, shape, pieces): pieces() yields the tensor's bits in order, of `STORED[dtype]`.

    Raises:
        ValueError: if a tensor's pieces are not of the size that its shape tells.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # widest numbers first, as safetensors itself orders them: so every tensor is aligned
    entries = sorted(entries, key=lambda entry: (-np.dtype(STORED[entry[1]]).itemsize, entry[0]))
    for name, dtype, shape, _ in entries:
        end = offset + math.prod(shape) * np.dtype(STORED[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, _, pieces in entries:
            for piece in pieces():
                file.write(np.ascontiguousarray(piece, STORED[dtype]).data)
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"{name}: its pieces are not of its size")
