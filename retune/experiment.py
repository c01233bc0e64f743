"""From a raw config mapping to validated runs: the main one and its variants.

Every mistake of every section and variant is collected; `ConfigError` carries one line for each.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from retune.config import Config
from retune.runtime import UserError


class ConfigError(UserError):
    """All mistakes of a config, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class Experiment:
    """The runs of a config: `runs[name]` is the main run, `runs[name.variant]` the others, in order."""

    runs: dict[str, Config]

    @property
    def name(self) -> str:
        return next(iter(self.runs))


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, key by key where both are mappings; neither is changed."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def load(raw: Mapping[str, Any], files: Sequence[str] = ()) -> Experiment:
    """Validate `raw`; `files` are the YAML files it was read from, to name file and line.

    Raises:
        ConfigError: with one line for each mistake, all at once.
    """
    marks, problems = _marks(files)
    main = _validate(raw, (), problems)
    runs = {main.name: main} if main else {}
    variants = raw.get("variants") or {}
    for name, overrides in variants.items() if isinstance(variants, Mapping) else ():
        if not isinstance(overrides, Mapping):
            continue  # the main run's validation has reported it
        path = ("variants", name)
        fixed = [key for key in ("name", "variants") if key in overrides]
        problems += [((*path, key), "a variant cannot change this key") for key in fixed]
        rest = {key: value for key, value in raw.items() if key != "variants"}
        variant = _validate(deep_merge(rest, overrides), path, problems, overrides)
        if variant and main:
            runs[f"{main.name}.{name}"] = variant
    if main and not problems:
        problems += _references(runs)
    if problems:
        unique = dict.fromkeys(f"{_place(path, marks, files)}{_dotted(path)}: {text}" for path, text in problems)
        raise ConfigError(list(unique))
    return Experiment(runs)


def _validate(raw: Mapping, prefix: tuple, problems: list, overrides: Mapping | None = None) -> Config | None:
    config, found = None, _unknown_arguments(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        found = [_explain(item) for item in error.errors()] + found
    for path, text in found:
        # A variant repeats the main run's mistakes; report only those that its own keys bring, in whatever section.
        if overrides is None or (path, text) not in problems:
            problems.append(((*prefix, *path), text))
    return None if found else config


def _unknown_arguments(raw: Mapping[str, Any]) -> list[tuple[tuple, str]]:
    problems = []
    for section in (("train", "args"), ("reranker", "fit", "args")):
        args: Any = raw
        for part in section:
            args = args.get(part) if isinstance(args, Mapping) else None
        for key in args if isinstance(args, Mapping) else ():
            if key not in training_argument_names():
                problems.append(((*section, key), _unknown(key, section, training_argument_names())))
            elif key in ("output_dir", "logging_dir"):
                problems.append(((*section, key), "retune sets this one itself; leave it out"))
    return problems


def _references(runs: Mapping[str, Config]) -> list[tuple[tuple, str]]:
    """`variant:<name>` must name another run that trains, without going round in a circle."""
    main = next(iter(runs))
    needs: dict[str, list[str]] = {}
    problems = []
    for run, config in runs.items():
        prefix = () if run == main else ("variants", run.removeprefix(f"{main}."))
        needs[run] = []
        for path, model in model_references(config):
            if not model.startswith("variant:"):
                continue
            target = run_of(model.removeprefix("variant:"), main)
            if target not in runs or runs[target].train is None:
                known = [name.removeprefix(f"{main}.") for name, other in runs.items() if other.train]
                problems.append(((*prefix, *path), f"no variant `{model}`; those that train: {', '.join(known)}"))
            else:
                needs[run].append(target)
    for run in runs:
        seen, queue = set(), list(needs[run])
        while queue:
            step = queue.pop()
            if step not in seen:
                seen.add(step)
                queue += needs[step]
        if run in seen:
            problems.append((("variants",), f"{run} needs its own tuned model (variant: references in a circle)"))
    return problems


def model_references(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """Every model that a run names, with the key that names it."""
    found = [(("embedder", "model"), config.embedder.model)]
    if config.reranker:
        found.append((("reranker", "model"), config.reranker.model))
    if config.mine and config.mine.embedder:
        found.append((("mine", "embedder", "model"), config.mine.embedder.model))
    if config.merge:
        found += [(("merge", "models"), model) for model in config.merge.models]
    return found


def run_of(variant: str, main: str) -> str:
    """The run that a variant's name stands for; the main run may be named too."""
    return main if variant == main else f"{main}.{variant}"


# ---- messages -----------------------------------------------------------------------------------


def _explain(error: Mapping[str, Any]) -> tuple[tuple, str]:
    path = tuple(part for part in error["loc"] if not (isinstance(part, str) and "[" in part))
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return path, _unknown(str(path[-1]), path[:-1], _keys_at(path[:-1]))
    if kind == "missing":
        return path, "required, but not given"
    if kind == "string_pattern_mismatch" and path and path[-1] == "[key]":
        return path[:-1], "expected a name of letters, digits, - and _"
    text = error["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be ", "expected ", text)
    if inner := re.match(r"^([a-z_]+(?:\.[a-z_]+)+|score): (.*)", text, re.S):
        return (*path, *inner[1].split(".")), inner[2]
    shown = "" if "found" in text or isinstance(found, (Mapping, BaseModel)) else f", found {found!r}"
    return path, text + shown


def _unknown(key: str, parents: tuple, siblings: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, siblings, 1, 0.6)
    if near:
        return f"unknown key; did you mean {_dotted((*parents, near[0]))}?"
    everywhere = {path.rsplit(".", 1)[-1]: path for path in reversed(known_paths())}
    near = difflib.get_close_matches(key, everywhere, 1, 0.75)
    if near:
        return f"unknown key; did you mean {everywhere[near[0]]}?"
    if key in training_argument_names():
        return f"unknown key; did you mean train.args.{key}?"
    return f"unknown key; known here: {', '.join(siblings)}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, also inside lists, mappings and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_of(arg))), None)


def _keys_at(path: tuple) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None:  # a name chosen by the user: dataset, benchmark
            continue
        section = section_of(field.annotation) or section
    return list(section.model_fields)


def known_paths(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the config as a dotted path, in order."""
    found = []
    for key, field in section.model_fields.items():
        found.append(prefix + key)
        inner = section_of(field.annotation)
        if inner:
            named = "<name>." if "dict[" in str(field.annotation) else ""
            found += known_paths(inner, f"{prefix}{key}.{named}")
    return found


@lru_cache(1)
def training_argument_names() -> tuple[str, ...]:
    """Names of `transformers.TrainingArguments`, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return tuple(n.target.id for n in body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_"))


def _dotted(path: Sequence) -> str:
    return ".".join(str(part) for part in path) or "config"


Marks = dict[tuple[str, ...], tuple[str, int]]
"""{key path: (file, line)}"""


def _marks(files: Sequence[str]) -> tuple[Marks, list[tuple[tuple, str]]]:
    """Where each key stands, and a problem for each that stands twice in a file, of which YAML takes the last without
    a word; a later file overrides an earlier one."""
    marks: Marks = {}
    problems: list[tuple[tuple, str]] = []

    def walk(node: yaml.Node, path: tuple[str, ...], file: str) -> None:
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                own = (*path, name)
                if name in lines and name != "<<":
                    problems.append((own, f"given twice, first in line {lines[name]}; put both into one"))
                lines.setdefault(name, line)
                marks[own] = (file, line)
                walk(value, own, file)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                marks[(*path, str(index))] = (file, value.start_mark.line + 1)
                walk(value, (*path, str(index)), file)

    for file in files:
        try:
            node = yaml.compose(Path(file).read_text(), Loader=yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if node is not None:
            walk(node, (), file)
    return marks, problems


def _place(path: Sequence, marks: Marks, files: Sequence[str]) -> str:
    for end in range(len(path), 0, -1):
        if mark := marks.get(tuple(str(part) for part in path[:end])):
            return f"{mark[0]}:{mark[1]}: "
    return f"{files[-1]}: " if files else ""


def schema() -> dict[str, Any]:
    """The JSON schema of the config, for editors."""
    return Config.model_json_schema()
