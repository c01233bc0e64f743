"""Job of the rules embed and embed_benchmark."""

from job import start

start(snakemake)

from retune.config import EmbedConfig, EmbedderConfig
from retune.stages.embed import embed

job, part = snakemake.params.settings, snakemake.params.part
_, *shard = part.replace("-of-", "-").split("-")  # texts-00-of-04
embed(
    table=snakemake.input.table,
    kind="passage" if shard else "query",
    settings=EmbedConfig(**job["settings"]),
    embedder=EmbedderConfig(**job["embedder"]),
    out=snakemake.output[0],
    shard=(int(shard[0]), int(shard[1])) if shard else (0, 1),
)
