"""Job of the rule weigh."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import EmbedderConfig, MergeConfig
from retune.stages.weigh import by_examples, by_search

job, files = snakemake.params.settings, snakemake.params
settings, models = MergeConfig(**job["settings"]), job["settings"]["models"]
shared = {"models": models, "embedder": EmbedderConfig(**job["embedder"]), "out": Path(snakemake.output[0])}
if settings.search:
    by_search(
        **shared,
        aside={name: Path(path) for name, path in files.aside.items()},
        guards={g: {name: Path(path) for name, path in tables.items()} for g, tables in files.guards.items()},
        settings=settings.search,
        seed=job["seed"],
    )
else:
    by_examples(**shared, examples=Path(settings.examples), temperature=settings.temperature)
