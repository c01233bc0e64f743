"""Job of the rule ingest."""

from job import start

start(snakemake)

from retune.config import IngestConfig
from retune.stages.ingest import ingest

job = snakemake.params.settings
ingest(
    IngestConfig(**job["settings"]),
    dict(snakemake.output.items()),
    job["seed"],
    benchmarks=snakemake.params.benchmarks,
    levels=job["levels"],
)
