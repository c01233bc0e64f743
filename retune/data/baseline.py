"""Which model a measured one is tested against: base, ranked by the same head.

What is measured is called `<model>`, or `<model>-<head>` where another head than dense ranks.
"""

from __future__ import annotations

BASE = "base"


def baseline(model: str) -> str:
    """`base` for `tuned`, `base-sparse` for `tuned-sparse`; its own name for what is a baseline itself."""
    _, dash, head = model.partition("-")
    return f"{BASE}{dash}{head}"
