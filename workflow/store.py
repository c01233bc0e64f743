"""Inputs and results in an object store, which Snakemake's storage plugins fetch and put: what the workflow must mind.

What a job must mind is in scripts/job.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retune.runtime import UserError


def stored_weights(reference: str) -> list[str]:
    """The folder of a model in an object store, which `./` before its name tells from a model of the hub."""
    return [reference] if reference.startswith("./") else []


def stored_files(patterns: Sequence[str], key: str) -> list[str]:
    """Files in an object store, which are named one by one: nothing is listed while a config is read.

    Raises:
        UserError: for what cannot be the name of a file beside `results/`.
    """
    for pattern in patterns:
        path = Path(pattern)
        elsewhere = path.is_absolute() or not {"..", "~"}.isdisjoint(path.parts)
        if elsewhere or not path.suffix or not set(pattern).isdisjoint("*?["):
            raise UserError(
                f"{key}: {pattern}: with results in an object store, name each file by its path beside `results/` there"
            )
    return list(patterns)


def see_folders_of_other_machines() -> None:
    """Have the S3 plugin ask again whether a folder is there.

    It (0.3.6) remembers that a folder was absent, so Snakemake would not see a model which a job on another machine has
    stored meanwhile.
    """
    from snakemake_storage_plugin_s3 import StorageObject

    asked = StorageObject.exists

    def exists(self: StorageObject) -> bool:
        found = asked(self)
        if not found:
            self._is_dir = None
        return found

    StorageObject.exists = exists
