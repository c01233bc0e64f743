"""Job of the rule benchmark."""

from job import start

start(snakemake)

from retune.config import BenchmarkConfig
from retune.stages.ingest import benchmark

job = snakemake.params.settings
benchmark(BenchmarkConfig(**job["settings"]), dict(snakemake.output.items()), job["name"])
