"""The heads of an M3 embedder beside the dense one (BGE-M3, arXiv:2402.03216), and the files that hold them.

    sparse    how much each token counts, a number of at least 0; special tokens count for nothing
    colbert   a vector for each token but the first, for late interaction

A checkpoint has them as `heads.safetensors`, and as FlagEmbedding's two pickled files beside it.  Knows
token states and ids; nothing of backbones or scores.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from retune.model.companions import HEADS_FILE as FILE
from retune.runtime import UserError, log

PARTS = ("sparse_linear", "colbert_linear")  # FlagEmbedding has each in a file `<part>.pt`


class Heads(nn.Module):
    """Token states → weights and vectors of the tokens.

    Args:
        hidden: width of a token's state. colbert_dim: width of a token's vector.
        special: ids of tokens that count for nothing, int64 [S].
    """

    def __init__(self, hidden: int, colbert_dim: int, special: Tensor) -> None:
        super().__init__()
        self.sparse_linear, self.colbert_linear = nn.Linear(hidden, 1), nn.Linear(hidden, colbert_dim)
        self.register_buffer("special", special, persistent=False)

    @property
    def colbert_dim(self) -> int:
        return self.colbert_linear.out_features

    def sparse(self, states: Tensor, ids: Tensor) -> Tensor:
        """States [T, D] of the tokens `ids` int64 [T] → weights float32 [T]."""
        found = torch.relu(self.sparse_linear(states)).squeeze(-1).float()  # [T]
        return found * ~torch.isin(ids, self.special)

    def colbert(self, states: Tensor, scaled: bool) -> Tensor:
        """States [T, D] → vectors float32 [T, C], of length 1 where `scaled`."""
        vectors = self.colbert_linear(states).float()  # [T, C]
        return normalize(vectors, dim=-1) if scaled else vectors


def special_ids(tokenizer) -> Tensor:
    """Ids of the tokens that never count: first, last, padding and unknown, int64 [S]."""
    named = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return torch.tensor(sorted({number for number in named if number is not None}))


def there(folder: Path) -> bool:
    """Whether a checkpoint has heads."""
    return (folder / FILE).is_file() or any((folder / f"{part}.pt").is_file() for part in PARTS)


def read(folder: Path) -> dict[str, Tensor]:
    """The heads' weights, `sparse_linear.weight` and so on; {} where the checkpoint has none.

    Raises:
        UserError: for a file that cannot be read, or where one of the two is missing.
    """
    if not there(folder):
        return {}
    try:
        if (folder / FILE).is_file():
            return load_file(folder / FILE)
        found = {part: torch.load(folder / f"{part}.pt", map_location="cpu", weights_only=True) for part in PARTS}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"model {folder}: it has only one of M3's heads; {missing} is missing") from None
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"model {folder}: its heads cannot be read: {str(error).strip().splitlines()[0]}") from None
    return {f"{part}.{name}": weight for part, state in found.items() for name, weight in state.items()}


def load(folder: Path, hidden: int, special: Tensor) -> Heads | None:
    """The heads of a checkpoint; None where it has none.

    Raises:
        UserError: if they do not fit its backbone.
    """
    state = read(folder)
    if not state:
        return None
    try:
        heads = Heads(hidden, len(state["colbert_linear.weight"]), special)
        heads.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"model {folder}: its heads do not fit: {reason}") from None
    return heads


def fresh(hidden: int, colbert_dim: int | None, special: Tensor, seed: int) -> Heads:
    """New heads, drawn with `seed`, as wide as the backbone where no `colbert_dim` is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(hidden, colbert_dim or hidden, special)
    log.info("new heads, drawn with seed %d: sparse, and colbert of %d dimensions", seed, heads.colbert_dim)
    return heads


def write(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the heads' weights into a checkpoint's folder, for retune and for FlagEmbedding."""
    state = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    save_file(state, folder / FILE)
    for part in PARTS:
        own = {name.split(".")[1]: weight for name, weight in state.items() if name.split(".")[0] == part}
        torch.save(own, folder / f"{part}.pt")
