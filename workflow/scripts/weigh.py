"""Job of the rule weigh."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import EmbedderConfig, MergeConfig
from retune.stages.weigh import by_examples, by_search

job, files = snakemake.params.settings, snakemake.params
settings, models = MergeConfig(**job["settings"]), job["settings"]["models"]
out = Path(snakemake.output[0])
if settings.search:
    by_search(
        models=models,
        revisions=[own.get("revision") for own in job["own"]],
        aside={name: Path(path) for name, path in files.aside.items()},
        guards={g: {name: Path(path) for name, path in tables.items()} for g, tables in files.guards.items()},
        levels=job["levels"],
        settings=settings.search,
        embedder=EmbedderConfig(**job["embedder"]),
        seed=job["seed"],
        out=out,
    )
else:
    embedders = [EmbedderConfig(**job["embedder"] | own) for own in job["own"]]
    by_examples(
        models=models,
        embedders=embedders,
        examples=Path(settings.examples),
        temperature=settings.temperature,
        out=out,
    )
