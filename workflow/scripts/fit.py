"""Job of the rule fit."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import RerankerConfig
from retune.stages.fit import fit

job, files = snakemake.params.settings, snakemake.input
fit(
    texts=Path(files.texts),
    queries=Path(files.queries),
    pairs=Path(files.pairs),
    reranker=RerankerConfig(**job["reranker"]),
    seed=job["seed"],
    state=Path(snakemake.params.state),
    model_out=Path(snakemake.output.model),
    history_out=Path(snakemake.output.history),
)
