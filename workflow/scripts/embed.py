"""Job of the rules embed and embed_benchmark."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import EmbedConfig, EmbedderConfig
from retune.data.encode import all_gpus
from retune.stages.embed import embed

job, part = snakemake.params.settings, snakemake.params.part
_, *shard = part.replace("-of-", "-").split("-")  # texts-00-of-04
settings, embedder = EmbedConfig(**job["settings"]), job["embedder"]
if embedder["model"] == "input":  # its folder, or the files in it, come first
    model = Path(snakemake.input.model[0])
    embedder |= {"model": str(model if model.is_dir() else model.parent)}
embed(
    table=snakemake.input.table,
    kind="passage" if shard else "query",
    settings=settings,
    embedder=EmbedderConfig(**embedder),
    out=snakemake.output[0],
    shard=(int(shard[0]), int(shard[1])) if shard else (0, 1),
    cache=Path("results/.vectors") if settings.cache else None,
    devices=all_gpus(),
)
