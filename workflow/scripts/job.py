"""First import of every script: finds the library beside the workflow, and makes the process a job.

So a job needs nothing installed but the packages of its environment, also under `--sdm conda`.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (ROOT, os.environ.get("PYTHONPATH")) if part)

from retune.runtime import start_job


def start(snakemake) -> None:
    """Send output to the rule's log and keep to its threads; call it before anything heavy is imported."""
    start_job(snakemake.log[0], snakemake.threads)
