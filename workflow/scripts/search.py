"""Job of the rule search: a part of the texts."""

from job import start

start(snakemake)

from retune.config import MineConfig
from retune.stages.search import search_part

files = snakemake.input
lengths, bins = list(files.lengths) or (None, None)
search_part(
    queries=files.queries,
    query_vectors=files.query_vectors,
    text_vectors=list(files.text_vectors),
    settings=MineConfig(**snakemake.params.settings["settings"]),
    out=snakemake.output[0],
    lengths=lengths,
    bins=bins,
)
