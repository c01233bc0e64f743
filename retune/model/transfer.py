"""Batches to the device and results back, without waiting for either.

On a GPU copies go through pinned memory, so that they run beside the computation; the host pads
the next batch meanwhile.  On a CPU nothing is copied.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

IN_FLIGHT = 2  # batches whose results may be on their way


def sent(part: Tensor, device: torch.device) -> Tensor:
    """`part` on the device; on a GPU the copy may still be running, in the order of the device's other work."""
    if device.type != "cuda":
        return part.to(device)
    # torch keeps the pinned block from being used again until the copy is done
    return part.pin_memory().to(device, non_blocking=True)


class Results:
    """Rows of results, put together on the host in any order.

    A result of a GPU is copied asynchronously and read only after the event behind its copy, at most
    `IN_FLIGHT` batches later.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._values: np.ndarray | None = None
        self._waiting: deque[tuple[np.ndarray, Tensor, torch.cuda.Event]] = deque()

    def add(self, rows: np.ndarray, out: Tensor) -> None:
        """Take over the results `out`, float32 [B, ...], of the rows [B]."""
        if out.device.type != "cuda":
            self._write(rows, out.cpu().numpy())
            return
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(out.device))
        self._waiting.append((rows, host, done))
        if len(self._waiting) > IN_FLIGHT:
            self._settle()

    def array(self) -> np.ndarray:
        """All results, float32 [n, ...]; [0] where there are none."""
        while self._waiting:
            self._settle()
        return np.empty((0,), np.float32) if self._values is None else self._values

    def _settle(self) -> None:
        rows, host, done = self._waiting.popleft()
        done.synchronize()
        self._write(rows, host.numpy())

    def _write(self, rows: np.ndarray, values: np.ndarray) -> None:
        if self._values is None:
            self._values = np.empty((self.n, *values.shape[1:]), np.float32)
        self._values[rows] = values
