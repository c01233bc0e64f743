"""Files of data sets on the hub, by references `hub:<id>[@<revision>]:<files>`.

`<files>` is a glob over paths in the repository, or a word such as `train` that a path holds: the way in
which data sets name their splits.  A download is taken from the cache where the revision is there already.
Imports the hub's client only when it is asked.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from retune.data.files import COMPRESSED, natural
from retune.runtime import UserError, log
from retune.sections.evaluation import HUB

# In a table's metadata: {role: reference with the commit}, as JSON, of what it was made from.
PINNED = "hub"
# Of one collection in several forms, the first of these is read.
SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".txt")
# The hub's own names of a split beside those which papers use.
ALSO = {"dev": ("dev", "validation", "valid", "val"), "validation": ("validation", "dev", "valid", "val")}


class Reference(NamedTuple):
    """A data set's id, the revision that is asked for, and which of its files."""

    id: str
    revision: str | None
    files: str

    def __str__(self) -> str:
        return f"{HUB}{self.id}{f'@{self.revision}' if self.revision else ''}:{self.files}"


def parse(reference: str) -> Reference:
    """The parts of `hub:<id>[@<revision>]:<files>`."""
    found = re.fullmatch(rf"{HUB}([^@:]+)(?:@([^:]+))?:(.+)", reference)
    if not found:
        raise UserError(f"{reference}: expected hub:<owner>/<name>[@<revision>]:<files>")
    return Reference(found[1], found[2], found[3])


class Found(NamedTuple):
    """Files on this machine and, of those from the hub, the reference that names the commit they are of."""

    files: list[Path]
    pinned: str | None


def local(reference: str) -> Found:
    """The files behind a reference: those on this machine as they are, those of the hub downloaded once.

    Raises:
        UserError: where the hub has no such data set, revision or file, or cannot be reached.
    """
    if not reference.startswith(HUB):
        return Found([Path(reference)], None)
    wanted = parse(reference)
    folder = _download(wanted)
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    files = _chosen(paths, wanted.files)
    if not files:
        known = _listed(wanted._replace(revision=folder.name))
        raise UserError(f"{wanted}: no such file among those of the data set: {', '.join(known) or 'none'}")
    pinned = str(wanted._replace(revision=folder.name))
    how = "" if wanted.revision else f"; to pin it, write {pinned}"
    log.info("%s: %s of revision %s%s", reference, ", ".join(files[:3]), folder.name, how)
    return Found([folder / file for file in files], pinned)


def _words(files: str) -> tuple[str, ...]:
    """What paths may hold, or () for a glob."""
    return () if re.search(r"[*?\[/.]", files) else ALSO.get(files, (files,))


def _form(path: str) -> int | None:
    """Place of a file's form in `SUFFIXES`; None for a file of another form."""
    plain = re.sub("|".join(re.escape(suffix) + "$" for suffix in COMPRESSED), "", path)
    return next((place for place, suffix in enumerate(SUFFIXES) if plain.endswith(suffix)), None)


def _chosen(paths: list[str], files: str) -> list[str]:
    """The paths that a glob or word stands for, all of the same form, in natural order."""
    words = _words(files)
    if not words:
        return sorted((path for path in paths if fnmatch(path, files)), key=lambda path: natural(Path(path)))
    for word in words:
        held = [path for path in paths if re.search(rf"(^|[^a-z0-9]){re.escape(word)}([^a-z0-9]|$)", path.lower())]
        forms = {path: form for path in held if (form := _form(path)) is not None}
        if forms:
            first = min(forms.values())
            return sorted((p for p, form in forms.items() if form == first), key=lambda path: natural(Path(path)))
    return []


def _download(wanted: Reference) -> Path:
    """The folder of the revision, with at least the wanted files in it; its name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{word}*" for word in _words(wanted.files)] or [wanted.files]
    try:
        options = {"repo_type": "dataset", "revision": wanted.revision, "allow_patterns": patterns}
        return Path(snapshot_download(wanted.id, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{wanted}: not to be had from the hub ({reason})") from None


def _listed(wanted: Reference, shown: int = 10) -> list[str]:
    """Some names of files of the data set, for a message."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_repo_files(wanted.id, repo_type="dataset", revision=wanted.revision)
    except Exception:  # whatever the client may raise: the mistake itself is told in any case
        return []
    files = sorted(path for path in found if _form(path) is not None)
    return files[:shown] + (["…"] if len(files) > shown else [])
