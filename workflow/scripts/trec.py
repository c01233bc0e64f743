"""Job of the rule trec."""

from job import start

start(snakemake)

from pathlib import Path

from retune.data import trec

paths = [Path(snakemake.input[name]) for name in ("run", "queries", "texts")]
trec.write(*paths, out=Path(snakemake.output[0]), tag=snakemake.wildcards.judged)
