"""How many tokens a batch may have: given, or found by trying, longest texts first.

Knows sizes and what an out-of-memory error looks like; nothing of texts or models.
"""

from __future__ import annotations

import torch

from retune.runtime import log

FIRST, LAST = 16_384, 131_072  # padded tokens: where a GPU's search begins, and beyond which nothing is gained
MARGIN = 7 / 8  # of half of what did not fit: allocators need room between their blocks
CPU_BUDGETS = {torch.float32: 2048}  # padded tokens whose activations stay in the caches; measured
CPU_BUDGET = 4096  # in 16 bits


class TokenBudget:
    """Padded tokens of a batch.

    A budget below its ceiling doubles with each batch that filled it and fitted.  One that did not
    fit is halved, less a margin, and grows no more: what was computed is never computed again, and
    a failure is not repeated with every batch.

    Attributes:
        tokens: the budget now. ceiling: how far it may grow.
    """

    def __init__(self, tokens: int, ceiling: int | None = None) -> None:
        self.tokens, self.ceiling = tokens, max(tokens, ceiling or 0)

    @property
    def growing(self) -> bool:
        """Whether larger batches are still to be tried."""
        return self.tokens < self.ceiling

    def rows(self, width: int) -> int:
        """Texts of `width` tokens in a batch; one at least."""
        return max(1, self.tokens // max(1, width))

    def fitted(self, size: int, room: bool = True) -> None:
        """A batch of `size` padded tokens has been computed; `room`: whether memory for twice of it is left."""
        if not self.growing or 2 * size <= self.tokens:  # too small to tell
            return
        if room:
            self.tokens = min(2 * self.tokens, self.ceiling)
        else:
            self.ceiling = self.tokens
        if not self.growing:
            log.info("batches of %d tokens", self.tokens)

    def failed(self, size: int) -> None:
        """A batch of `size` padded tokens did not fit the memory."""
        self.tokens = self.ceiling = max(1, int(size / 2 * MARGIN))
        log.warning("out of memory: going on with batches of %d tokens", self.tokens)


def budget_for(device: torch.device, dtype: torch.dtype) -> TokenBudget:
    """The budget where none is given: on a GPU to be found, on a CPU what fits the caches."""
    if device.type == "cuda":
        return TokenBudget(FIRST, LAST)
    return TokenBudget(CPU_BUDGETS.get(dtype, CPU_BUDGET) if device.type == "cpu" else FIRST)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU, in torch's allocator of the host or in numpy's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def room_to_double(device: torch.device) -> bool:
    """Whether the device has as much memory left as this process holds, and a tenth of it to spare."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free - total // 10 > torch.cuda.memory_reserved(device)
