"""Job of the rule train."""

from job import start

start(snakemake)

from pathlib import Path

from retune.config import EmbedderConfig, TrainConfig
from retune.stages.train import train

job, files = snakemake.params.settings, snakemake.input
train(
    texts=Path(files.texts),
    queries=Path(files.queries),
    pairs=Path(files.pairs),
    bins=Path(files.bins) if files.bins else None,
    judgments=Path(files.judgments) if files.judgments else None,
    settings=TrainConfig(**job["settings"]),
    embedder=EmbedderConfig(**job["embedder"]),
    seed=job["seed"],
    drop_longer_than=job["drop_longer_than"],
    state=Path(snakemake.params.state),
    model_out=Path(snakemake.output.model),
    history_out=Path(snakemake.output.history),
)
