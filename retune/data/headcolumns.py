"""Columns of an embeddings table in which M3's heads are stored, from flat arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def columns(tokens: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> dict[str, pa.Array]:
    """The columns tokens and weights of an embeddings table, from flat arrays."""
    starts = pa.array(offsets, pa.int32())
    return {
        "tokens": pa.ListArray.from_arrays(starts, pa.array(tokens, pa.int32())),
        "weights": pa.ListArray.from_arrays(starts, pa.array(weights, pa.float32())),
    }


def colbert_column(vectors: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """The column colbert of an embeddings table, from flat vectors [t, c]."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    kind = pa.list_(pa.field("element", flat.type, nullable=False), vectors.shape[1])
    rows = pa.FixedSizeListArray.from_arrays(flat, type=kind)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), rows)
