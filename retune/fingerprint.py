"""Fingerprints of code: which stage must run again after an edit of the library.

Snakemake watches a rule's script, not the modules which it imports.  A fingerprint covers the
script and every module of this package that it reaches, as syntax trees without comments and
docstrings, plus the versions of the packages that decide results.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
DECIDING = {"torch": "torch", "transformers": "transformers", "faiss": "faiss-cpu", "peft": "peft", "bm25s": "bm25s"}
# What these say reaches a stage as values, through its params.
VALUES_ONLY = {f"retune.{name}" for name in ("config", "sections", "experiment", "plan", "artifacts", "fingerprint")}


def fingerprint(script: str | Path) -> str:
    """A hash over `script` and all that it imports of this package, 16 hexadecimal digits."""
    seen: dict[str, str] = {}
    packages: set[str] = set()
    _reach(Path(script), "script", seen, packages)
    lines = [f"{name} {digest}" for name, digest in sorted(seen.items())]
    lines += [f"{name} {_version(DECIDING[name])}" for name in sorted(packages)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def reached(script: str | Path) -> list[str]:
    """Names of the modules of this package that `script` reaches, sorted."""
    seen: dict[str, str] = {}
    _reach(Path(script), "script", seen, set())
    return sorted(set(seen) - {"script"})


def content_key(
    settings: dict[str, Any], files: list[str | Path | None], models: Path | list[Path], module: str
) -> str:
    """A hash of what decides the result of a job that can be resumed.

    Args:
        settings: JSON-able.
        files: its tables, by their whole content, as the weights in the folders `models` are.
        module: path of the stage's module; an edit of what it reaches makes another job.
    """
    digest = hashlib.sha256(json.dumps([settings, fingerprint(module)], sort_keys=True).encode())
    folders = [models] if isinstance(models, Path) else models
    kinds = ("*.safetensors", "*.bin", "*_linear.pt")
    weights = [path for folder in folders for kind in kinds for path in sorted(folder.glob(kind))]
    for path in [*files, *weights]:
        if path is not None:
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()[:32]


def _reach(file: Path, name: str, seen: dict[str, str], packages: set[str]) -> None:
    if name in seen:
        return
    stat = file.stat()
    seen[name], imports = _digest(str(file), stat.st_mtime_ns, stat.st_size)
    for module in imports:
        if module.split(".")[0] in DECIDING:
            packages.add(module.split(".")[0])
        elif module.split(".")[0] == "retune" and ".".join(module.split(".")[:2]) not in VALUES_ONLY:
            base = ROOT.joinpath(*module.split(".")[1:])
            for found in (base.with_suffix(".py"), base / "__init__.py"):
                if found.is_file():
                    _reach(found, module, seen, packages)


@lru_cache(None)
def _digest(file: str, mtime: int, size: int) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(Path(file).read_text())
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module too; a name that is none is no file
            imports += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(sorted(set(imports)))


@lru_cache(None)
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
