"""Job of the rule evaluate."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

from pathlib import Path

from retune.stages.evaluate import evaluate

queries, *texts = [Path(file) for file in snakemake.input]
evaluate(queries=queries, texts=texts, k=snakemake.params.settings["k"], out=Path(snakemake.output[0]))
