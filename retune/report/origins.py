"""Where a benchmark is from: the data sets of the hub, each with the commit that was read.

Knows the metadata that reading a benchmark leaves in its tables; nothing of measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from retune import tables
from retune.data.hub import PINNED
from retune.report.page import Html, join, paragraph, tag


def origin(files: Mapping[str, Path | str]) -> Html:
    """What a benchmark with these tables was read from, pinned; nothing where no part of it is from the hub."""
    found = json.loads(tables.metadata(files["texts"]).get(PINNED, "{}"))
    if not found:
        return Html("")
    parts = [join([role, " ", tag("code", reference)]) for role, reference in found.items()]
    return paragraph("Read from the hub: ", join(parts, ", "), ".", css="note")
