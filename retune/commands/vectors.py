"""A table's vectors, as one or several steps of a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retune import tables
from retune.commands import models
from retune.commands.flags import Flag, Given, from_section
from retune.commands.work import Work, model_identity
from retune.config import EmbedConfig, EmbedderConfig

GROUP = "embedding"
SHARD = 500_000  # rows of a shard in a folder that is kept: what an interruption costs at most
OTHER = {"query": "passage_", "passage": "query_"}


def embed_flags(heads: bool = False) -> list[Flag]:
    """Flags of the section `embed`; with `heads`, also which heads of an M3 model are stored."""
    found = from_section(
        "embed", EmbedConfig, GROUP,
        {
            "dtype": {"names": ("vector_dtype",)},
            "shards": {
                "help": "Files that the vectors of passages are made in, one after the other.", "shown":
                f"1; with --work_dir, one for {SHARD:,} passages",
            },
        },
        leave=("cache",) if heads else ("cache", "heads"),
    )  # fmt: skip
    about = "Folder of vectors of earlier runs: a text that the same model embedded before is not embedded again."
    return [*found, Flag(("vector_cache",), about, group=GROUP)]


def settings(given: Given, embedder: EmbedderConfig, kind: str, heads: Sequence[str] | None = None) -> EmbedConfig:
    """The section `embed` that the flags make, for texts of a kind; `heads` are stored where the flags do not say."""
    longest = getattr(embedder, f"{kind}_max_length")
    budget = models.token_budget(given, "embedder_batch_size", longest, embedder.dtype)
    return given.section("embed", EmbedConfig, **budget, **({"heads": list(heads)} if heads else {}))


def embed_table(
    given: Given, work: Work, table: Path, kind: str, embedder: EmbedderConfig, devices: Sequence[str],
    after: Sequence[str], heads: Sequence[str] | None = None,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Embed the rows of a table of texts or queries; `heads` as for `settings`.

    Returns:
        The embeddings tables, of rising ids, and the names of the steps that made them.
    """
    from retune.stages.embed import embed

    chosen = settings(given, embedder, kind, heads)
    n_rows = tables.n_rows(table)
    count = chosen.shards if given.typed("shards") else min(99, -(-n_rows // SHARD)) if work.kept else 1
    count = max(count, 1) if kind == "passage" else 1
    kept = {key: value for key, value in embedder.model_dump(mode="json").items() if not key.startswith(OTHER[kind])}
    of = {"settings": chosen.model_dump(mode="json"), "embedder": kept, "rows": n_rows}
    of["model"] = model_identity(kept) if work.kept else None
    cache = Path(given["vector_cache"]).expanduser() if given["vector_cache"] else None
    found, steps = [], []
    for index in range(count):
        out = work.path(f"embed/{kind}-{index:02d}-of-{count:02d}.parquet")

        def do(index: int = index, out: Path = out) -> None:
            embed(
                table=table, kind=kind, settings=chosen, embedder=embedder, out=out, shard=(index, count),
                cache=cache, devices=devices,
            )  # fmt: skip

        steps.append(f"embed {kind} {index + 1} of {count}")
        work.step(steps[-1], "embed", [out], of, do, after)
        found.append(out)
    return found, steps
