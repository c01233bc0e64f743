"""Job of the rule scores: one part of the pairs."""

from job import start

start(snakemake)

from retune.config import RerankerConfig, ScoreConfig
from retune.stages.scores import scores

job, files = snakemake.params.settings, snakemake.input
index, count = snakemake.params.shard.split("-of-")
scores(
    texts=files.texts,
    queries=files.queries,
    pairs=files.pairs,
    settings=ScoreConfig(**job["settings"]),
    reranker=RerankerConfig(**job["reranker"]),
    out=snakemake.output[0],
    state=snakemake.params.state,
    shard=(int(index), int(count)),
    only_missing=job["only_missing"],
)
