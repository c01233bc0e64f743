"""Job of the rule split."""

from job import start

start(snakemake)

from retune.config import SplitConfig
from retune.stages.split import split

job, files = snakemake.params.settings, snakemake.input
split(
    files.texts,
    files.queries,
    files.pairs,
    dict(snakemake.output.items()),
    SplitConfig(**job["settings"]),
    job["embedder"],
    snakemake.threads,
)
