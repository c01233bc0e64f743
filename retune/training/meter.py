"""What a run shows of itself while it goes: progress, throughput, padding, and what its batches measured."""

from __future__ import annotations

import time

from transformers import TrainerCallback

from retune.runtime import log, progress


class Meter(TrainerCallback):
    """Progress bar and counts of this process, in all and since the last log."""

    def __init__(self) -> None:
        self.queries = self.tokens = self.padded = 0
        self.since = (0, 0)  # tokens and padded tokens at the last log
        self.bar = None

    def add(self, queries: int, tokens: int, padded: int) -> None:
        """Count a batch: `padded` tokens were computed, `tokens` of them were no padding."""
        self.queries, self.tokens, self.padded = self.queries + queries, self.tokens + tokens, self.padded + padded

    def lap(self) -> tuple[int, int, float]:
        """Tokens, padded tokens and seconds since the last call, what a checkpoint or an evaluation took left out."""
        tokens, padded = self.since
        now = time.perf_counter()
        found = self.tokens - tokens, self.padded - padded, now - self.mark
        self.since, self.mark = (self.tokens, self.padded), now
        return found

    def _pause(self) -> None:
        """What happened since the last log, if no batch was counted, is no training."""
        if self.since == (self.tokens, self.padded):
            self.mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        self.start = self.mark = time.perf_counter()
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = progress(state.max_steps, "train", "step")
            self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args, state, control, **_):
        self._pause()

    def on_evaluate(self, args, state, control, **_):
        self._pause()

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
        if self.padded and state.is_world_process_zero:
            seconds = time.perf_counter() - self.start
            log.info(
                "trained on %d queries in %.1f s: %.1f queries/s, %.0f tokens/s, %.1f%% padding",
                self.queries, seconds, self.queries / seconds, self.tokens / seconds,
                100 * (1 - self.tokens / self.padded),
            )  # fmt: skip
