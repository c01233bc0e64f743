"""Job of the rule benchmark."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

from retune.config import BenchmarkConfig
from retune.stages.ingest import benchmark

job = snakemake.params.settings
benchmark(BenchmarkConfig(**job["settings"]), dict(snakemake.output.items()), job["name"])
