"""Job of the rule mine."""

from job import start

start(snakemake)

from retune.config import MineConfig, RerankerConfig
from retune.stages.mine import mine

job, files = snakemake.params.settings, snakemake.input
lengths, bins = list(files.lengths) or (None, None)
query_vectors, *text_vectors = list(files.vectors) or [None]  # words alone need none
mine(
    texts=files.texts,
    queries=files.queries,
    pairs=files.pairs,
    query_vectors=query_vectors,
    text_vectors=text_vectors,
    settings=MineConfig(**job["settings"]),
    seed=job["seed"],
    out=snakemake.output.pairs,
    lengths=lengths,
    bins=bins,
    reranker=RerankerConfig(**job["reranker"]) if job["reranker"] else None,
    stats=snakemake.output.mining,
    found=list(files.found),
)
