"""Groups of queries that share a text, and the choice of whole groups for the dev split.

Two queries are in one group if they, or their positives, are the same text but for case and white
space, or are linked so by other queries (a connected component).  As groups go to one side whole,
no query and no positive stands on both.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from retune.data.text import digest, normalise


class Groups:
    """Union-find over normalised texts; 16 bytes a text are kept, never the text."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, int] = {}
        self._parent = array("q")
        self._queries = array("q")

    def add(self, query: str, positives: Iterable[str]) -> None:
        """Append a query, which links it and its positives."""
        root = self._root(self._node(query))
        self._queries.append(root)
        for text in positives:
            other = self._root(self._node(text))
            # The older root stays: a group is named by its first text, whatever the order of links.
            root, younger = (root, other) if root <= other else (other, root)
            self._parent[younger] = root

    def _node(self, text: str) -> int:
        node = self._nodes.setdefault(digest(normalise(text)), len(self._parent))
        if node == len(self._parent):
            self._parent.append(node)
        return node

    def _root(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def of_queries(self) -> np.ndarray:
        """The group of each query, int64 [queries]; groups count from 0 in first-seen order."""
        parent = np.array(self._parent)
        while not np.array_equal(above := parent[parent], parent):
            parent = above
        roots = parent[np.array(self._queries, dtype=np.int64)]
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def choose_dev(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which queries are set aside, bool [queries].

    Groups are taken in random order while their queries fit into `fraction` of all (at least one
    query).  Where none fits, the smallest is taken; where there is only one group, none.
    """
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    if fraction <= 0 or len(sizes) < 2:
        return np.zeros(len(groups), dtype=bool)
    room = min(max(1, round(fraction * len(groups))), len(groups) - 1)  # something is left to train on
    order = np.random.default_rng([seed, len(groups)]).permutation(len(sizes))
    taken = np.zeros(len(sizes), dtype=bool)
    for group in order:
        if sizes[group] <= room:
            taken[group] = True
            room -= sizes[group]
            if not room:
                break
    if not taken.any():
        taken[order[np.argmin(sizes[order])]] = True
    return taken[groups]
