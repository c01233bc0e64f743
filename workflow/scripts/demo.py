"""Job of the rule demo."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import DemoConfig
from retune.stages.demo import demo

job = snakemake.params.settings
demo(DemoConfig(**job["settings"]), Path(snakemake.output.train).parent, job["seed"])
