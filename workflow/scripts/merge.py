"""Job of the rule merge."""

from job import start

start(snakemake)

from pathlib import Path

from retune.stages.merge import merge

job = snakemake.params.settings
settings = job["settings"]
weights = Path(snakemake.input.weights) if snakemake.input.weights else settings["weights"]
merge(models=settings["models"], weights=weights, out=Path(snakemake.output[0]), revisions=job["revisions"])
