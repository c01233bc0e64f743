"""Job of the rule gate."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import MinDeltaConfig
from retune.stages.gate import gate

job = snakemake.params.settings
gate(
    metrics=Path(snakemake.input.metrics),
    settings=MinDeltaConfig(**job["settings"]),
    guards=job["guards"],
    out=Path(snakemake.output[0]),
)
