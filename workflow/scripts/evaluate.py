"""Job of the rule evaluate."""

from job import start

start(snakemake)

from pathlib import Path

from retune.stages.evaluate import evaluate

queries, *texts = [Path(file) for file in snakemake.input]
evaluate(queries=queries, texts=texts, out=Path(snakemake.output[0]), **snakemake.params.settings)
