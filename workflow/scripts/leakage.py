"""Job of the rule leakage."""

from job import start

start(snakemake)

from pathlib import Path

from retune.stages.leakage import leakage

leakage(
    train={name: Path(snakemake.input[name]) for name in ("texts", "queries", "pairs")},
    benchmarks={b: {t: Path(p) for t, p in tables.items()} for b, tables in snakemake.params.benchmarks.items()},
    levels=snakemake.params.settings["levels"],
    out=Path(snakemake.output[0]),
)
