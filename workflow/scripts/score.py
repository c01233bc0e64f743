"""Job of the rule score: the parts put together, and false negatives treated."""

from job import start

start(snakemake)

from retune.stages.score import score

job, files = snakemake.params.settings, snakemake.input
score(
    texts=files.texts,
    queries=files.queries,
    pairs=files.pairs,
    parts=list(files.parts),
    out=snakemake.output.pairs,
    counts=snakemake.output.counts,
    margin=job["margin"],
    action=job["false_negatives"],
    only_missing=job["only_missing"],
)
