"""Job of the rule demo."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

from pathlib import Path

from retune.config import DemoConfig
from retune.stages.demo import demo

job = snakemake.params.settings
demo(DemoConfig(**job["settings"]), Path(snakemake.output.train).parent, job["seed"])
