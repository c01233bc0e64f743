"""Section on training: loss, learning rate, gradient norm and what the batches showed, by step."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from retune.report import plots
from retune.report.page import Html, Section, count, decimal, figure, join, paragraph, plural, tag
from retune.report.spread import scan

POINTS = 400  # of a curve; more cannot be told apart
FURTHER = {
    "dev": ("On the queries that were set aside", "good", ""),
    "learning_rate": ("Learning rate", "base", ".1e"),
    "grad_norm": ("Norm of the gradient", "merged", ""),
    "accuracy": ("Accuracy", "tuned", ""),
    "positive_similarity": ("Similarity of the positives", "tuned", ""),
    "negative_similarity": ("Similarity of the negatives", "merged", ""),
    "sparse_nonzero": ("Share of tokens that the sparse head weighs", "base", ""),
}
"""Columns that are drawn where they were logged: title, colour and number format."""


COLLAPSED = "The sparse head has collapsed: at the end of training it weighs every token 0, and finds nothing."


def training(path: Path) -> Section | None:
    body = curves(path)
    return Section("training", "Training", body) if body else None


def curves(path: Path) -> Html | None:
    """Curves of a `history`; None where nothing was logged."""
    found = scan(path).sort("step").collect()
    losses = found.filter(pl.col("loss").is_not_null())
    if not len(losses):
        return None
    said = (
        f"{plural(int(found['step'].max()), 'step')}, {decimal(found['epoch'].max(), 2)} epochs. "
        f"Loss {decimal(losses['loss'][0])} at the first logged step, {decimal(losses['loss'][-1])} at the last."
    )
    alarm = []
    if "sparse_nonzero" in found.columns and found["sparse_nonzero"].drop_nulls()[-1:].to_list() == [0.0]:
        alarm.append(paragraph(COLLAPSED, css="bad"))
    drawn = [_curve(losses, "loss", "Loss", "tuned", "")]
    for column, (title, colour, y_format) in FURTHER.items():
        if column in found.columns and found[column].count() > 1:
            drawn.append(_curve(found, column, title, colour, y_format))
    return join([*alarm, paragraph(said), tag("div", *drawn, css="plots")])


def _curve(frame: pl.DataFrame, column: str, title: str, colour: str, y_format: str) -> Html:
    frame = frame.filter(pl.col(column).is_finite())
    group = -(-len(frame) // POINTS)
    caption = ""
    if group > 1:
        place = (pl.int_range(pl.len()) // group).alias("group")
        frame = frame.group_by(place, maintain_order=True).agg(pl.col("step").last(), pl.col(column).mean())
        caption = f"Means of {count(group)} logged steps each."
    rows = [{"step": step, column: value} for step, value in frame.select("step", column).iter_rows()]
    drawn = plots.lines(rows, "step", column, x_title="step", y_title=title.lower(), colour=colour, y_format=y_format)
    return figure(title, drawn, caption)
