"""scores: a reranker's teacher score for each distinct (query, passage), once, in parts that can be resumed.

What is finished is kept in a folder of its own, so that a job that dies repeats no more than the
groups it was at.  Several devices get one process each, which runs this module on a job file.  The
stage score puts the parts together.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from retune import processes, tables
from retune.config import RerankerConfig, ScoreConfig
from retune.data.teacher import read_distinct
from retune.data.text import shown
from retune.fingerprint import content_key
from retune.model.checkpoint import resolve
from retune.model.device import named
from retune.model.reranker import Reranker
from retune.runtime import UserError, atomic, log, progress

GROUP = 8192  # distinct pairs that are put together, sorted by length, scored and kept at a time


@dataclass(frozen=True)
class Group:
    """Distinct pairs `start` to `stop`, and the file that keeps their scores."""

    file: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Source:
    """What is scored, and how."""

    texts: Path
    queries: Path
    pairs: Path
    settings: ScoreConfig
    reranker: RerankerConfig
    only_missing: bool

    def written(self) -> dict[str, Any]:
        """JSON-able, for `read`."""
        files = {name: str(getattr(self, name)) for name in ("texts", "queries", "pairs")}
        chosen = {name: getattr(self, name).model_dump(mode="json") for name in ("settings", "reranker")}
        return files | chosen | {"only_missing": self.only_missing}

    @classmethod
    def read(cls, job: dict[str, Any]) -> Source:
        chosen = {"settings": ScoreConfig(**job["settings"]), "reranker": RerankerConfig(**job["reranker"])}
        return cls(
            Path(job["texts"]), Path(job["queries"]), Path(job["pairs"]), only_missing=job["only_missing"], **chosen
        )


def scores(
    *, texts: Path, queries: Path, pairs: Path, settings: ScoreConfig, reranker: RerankerConfig, out: Path,
    state: Path, shard: tuple[int, int] = (0, 1), only_missing: bool = False, devices: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the table `scores` of one part of the distinct pairs.

    Args:
        state: folder for finished groups; what an interrupted job of the same model and pairs left there is used,
            and at the end it is removed.
        shard: (index, count) of the part.
        only_missing: leave out pairs that have a score.
        devices: such as "cuda:0" and "cuda:1": a process each; the best one alone where not given.

    Raises:
        UserError: for a score that is not finite, naming the pair, and for a device that is not there.
    """
    source = Source(texts, queries, pairs, settings, reranker, only_missing)
    distinct, _ = read_distinct(texts, queries, pairs, only_missing)
    start, stop = (len(distinct) * (shard[0] + i) // shard[1] for i in (0, 1))
    folder = resolve(reranker.model, reranker.revision, reranker.sha256)
    chosen = {"reranker": reranker.model_dump(mode="json"), "part": [start, stop], "group": GROUP}
    adapters = sorted(Path(reranker.peft_path).expanduser().glob("*.safetensors")) if reranker.peft_path else []
    state = _claim(Path(state), content_key(chosen, [texts, queries, pairs, *adapters], folder, __file__))
    groups = [
        Group(str(state / f"{i:06d}.npy"), at, min(at + GROUP, stop)) for i, at in enumerate(range(start, stop, GROUP))
    ]
    missing = [group for group in groups if not Path(group.file).exists()]
    done = stop - start - sum(map(len, missing))
    if done:
        log.info("going on: %d of %d pairs were scored before", done, stop - start)
    if missing:
        with progress(stop - start, "score", "pairs") as bar:
            bar.update(done)
            _on_devices(source, missing, devices, state, bar)
    found = [np.load(group.file) for group in groups]
    columns = {
        "query_id": distinct.query_ids[start:stop], "text_id": distinct.text_ids[start:stop],
        "score": np.concatenate([np.empty(0, np.float32), *found]),
    }  # fmt: skip
    tables.write(out, "scores", columns)
    shutil.rmtree(state.parent)


def _claim(state: Path, key: str) -> Path:
    """The folder of this job's finished groups; what another model or other pairs left is removed."""
    own = state / key
    for other in state.glob("*"):
        if other != own:
            shutil.rmtree(other)
    own.mkdir(parents=True, exist_ok=True)
    return own


def _on_devices(source: Source, groups: list[Group], devices: Sequence[str], folder: Path, bar: Any) -> None:
    """Score the groups, dealt in turn to the devices' processes; this one is the first's."""
    devices = devices[: len(groups)]
    if len(devices) < 2:
        _fill(source, groups, devices[0] if devices else None, bar)
        return
    jobs = [
        source.written()
        | {"groups": [vars(group) for group in groups[number :: len(devices)]], "device": devices[number]}
        for number in range(1, len(devices))
    ]
    threads = max(1, torch.get_num_threads() // len(devices))
    with processes.working("retune.stages.scores", jobs, folder, bar, threads) as others:
        _fill(source, groups[:: len(devices)], devices[0], others)


def _fill(source: Source, groups: Sequence[Group], where: str | None, bar: Any) -> None:
    """Write the scores of each group, float32 [rows]; a text is tokenised once a group."""
    distinct, query_texts = read_distinct(source.texts, source.queries, source.pairs, source.only_missing)
    passages = tables.read(source.texts, "texts", ["text"])["text"]
    model = Reranker.load(source.reranker, target=named(where) if where else None)
    log.info("%d pairs, %s on %s", sum(map(len, groups)), model.dtype, model.device)
    for group in groups:
        rows = slice(group.start, group.stop)
        q, q_rows = np.unique(distinct.query_ids[rows], return_inverse=True)
        p, p_rows = np.unique(distinct.text_ids[rows], return_inverse=True)
        asked, read = query_texts.take(pa.array(q)).to_pylist(), passages.take(pa.array(p)).to_pylist()
        tokens = model.join(model.pieces(asked, "query"), model.pieces(read, "passage"), q_rows, p_rows)
        scores = model.scores(tokens, source.settings.batch_tokens, bar)
        if not np.isfinite(scores).all():
            bad = int(np.argmin(np.isfinite(scores)))
            raise UserError(
                f"the score of query {shown(asked[q_rows[bad]])} and passage {shown(read[p_rows[bad]])} "
                f"(text_id {p[p_rows[bad]]}) is not finite; set reranker.dtype: float32, or the teacher is broken"
            )
        with atomic(group.file) as part, part.open("wb") as stream:
            np.save(stream, scores)


def main(job: dict[str, Any]) -> None:
    """One of several processes: score its groups."""
    groups = [Group(**group) for group in job["groups"]]
    _fill(Source.read(job), groups, job["device"], processes.Told())


if __name__ == "__main__":
    sys.exit(processes.run_job(main, Path(sys.argv[1])))
