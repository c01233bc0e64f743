"""Job of the rule score."""

from job import start

start(snakemake)

from retune.config import RerankerConfig, ScoreConfig
from retune.stages.score import score

job, files = snakemake.params.settings, snakemake.input
score(
    texts=files.texts,
    queries=files.queries,
    pairs=files.pairs,
    settings=ScoreConfig(**job["settings"]),
    reranker=RerankerConfig(**job["reranker"]),
    out=snakemake.output[0],
)
