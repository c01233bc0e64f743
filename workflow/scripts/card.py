"""Job of the rule card."""

from job import start

start(snakemake)

from pathlib import Path

from retune.stages.card import card

job, files = snakemake.params.settings, snakemake.input
card(
    kind=job["kind"],
    name=job["name"],
    model=Path(files.model),
    settings=job,
    queries=Path(files.queries),
    pairs=Path(files.pairs),
    metrics=Path(files.metrics) if files.metrics else None,
    weights=Path(files.weights) if files.weights else None,
    out=Path(snakemake.output[0]),
)
