"""Job of the rule mine."""

from job import start

start(snakemake)

from retune.config import MineConfig
from retune.stages.mine import mine

job, files = snakemake.params.settings, snakemake.input
lengths, bins = list(files.lengths) or (None, None)
mine(
    texts=files.texts,
    queries=files.queries,
    pairs=files.pairs,
    query_vectors=files.vectors[0],
    text_vectors=list(files.vectors[1:]),
    settings=MineConfig(**job["settings"]),
    seed=job["seed"],
    out=snakemake.output[0],
    lengths=lengths,
    bins=bins,
)
