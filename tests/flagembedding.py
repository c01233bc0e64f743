"""FlagEmbedding, in the environment that RETUNE_FLAGEMBEDDING_PYTHON names: it needs an older transformers."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

PYTHON = os.environ.get("RETUNE_FLAGEMBEDDING_PYTHON")
needs_flagembedding = pytest.mark.skipif(
    not PYTHON, reason="RETUNE_FLAGEMBEDDING_PYTHON names no interpreter with FlagEmbedding"
)


def ask(script: str, *asked: object) -> str:
    """What `script` prints, which reads the list `asked` as JSON from its standard input."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, "-c", script]
    done = subprocess.run(command, input=json.dumps(asked), text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
