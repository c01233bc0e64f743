"""Job of the rule report."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import ReportConfig
from retune.stages.report import report

job = snakemake.params.settings
report(
    run=job["run"],
    inputs=dict(snakemake.params.tables) | {"costs": snakemake.params.costs, "worked": dict(snakemake.params.worked)},
    out=Path(snakemake.output[0]),
    settings=ReportConfig(**job["settings"]),
    guards=job["guards"],
)
