"""Job of the rule ingest."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

from retune.config import IngestConfig
from retune.stages.ingest import ingest

job = snakemake.params.settings
ingest(IngestConfig(**job["settings"]), dict(snakemake.output.items()), job["seed"])
