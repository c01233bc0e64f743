"""Job of the rule metrics."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

from pathlib import Path

from retune.stages.evaluate import metrics

job = snakemake.params.settings
metrics(
    runs={(b, m): Path(path) for b, models in snakemake.params.runs.items() for m, path in models.items()},
    benchmarks={b: {t: Path(p) for t, p in tables.items()} for b, tables in snakemake.params.benchmarks.items()},
    cutoffs=job["cutoffs"],
    seed=job["seed"],
    out=Path(snakemake.output[0]),
)
