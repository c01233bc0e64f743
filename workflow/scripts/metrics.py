"""Job of the rule metrics."""

from job import start

start(snakemake)

from pathlib import Path

from retune.stages.metrics import metrics

job = snakemake.params.settings
metrics(
    runs={(b, m): Path(path) for b, models in snakemake.params.runs.items() for m, path in models.items()},
    benchmarks={b: {t: Path(p) for t, p in tables.items()} for b, tables in snakemake.params.benchmarks.items()},
    cutoffs=job["cutoffs"],
    seed=job["seed"],
    levels=job["levels"],
    out=Path(snakemake.output[0]),
)
