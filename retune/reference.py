"""The reference page of the config, made from the typed sections: every key, its default, what it does."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from retune.config import Config
from retune.experiment import section_of
from retune.sections.base import fields_of

HEAD = """# The config

Every key, its default and what it does. Made by `retune reference` from the typed sections in
`retune/sections/`, as `workflow/schemas/config.schema.json` is, which an editor can check against.
`null` switches a stage off. `retune check mine.yaml` prints a config with all defaults filled in.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, "## Top level\n", _table(Config)]
    for key, section in _sections(Config):
        text = " ".join((section.__doc__ or "").split())
        parts += [f"## {key}\n", *([f"{text}\n"] if text else []), _table(section)]
    return "\n".join(parts)


def _sections(section: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = []
    for key, field in fields_of(section).items():
        inner = section_of(field.annotation)
        if inner and not (prefix and inner.__name__ == "EmbedderConfig"):
            path = f"{prefix}{key}" + (".<name>" if "dict[" in str(field.annotation) else "")
            found += [(path, inner), *_sections(inner, f"{path}.")]
    return found


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for key, field in fields_of(section).items():
        if section is Config and section_of(field.annotation):
            continue
        about = " ".join((field.description or "").split())
        rows.append(f"| `{key}` | {_default(field)} | {_kind(field.annotation)}{'. ' if about else ''}{about} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "on"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.replace("\n", "\\n")  # a row of a table is one line
    return str(value).replace("'", "")


def _kind(annotation: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in args)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(one) for one in args if one is not type(None))
    if origin is list:
        return "list of " + {"number": "numbers", "text": "texts"}.get(_kind(args[0]), _kind(args[0]))
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", bool: "true or false", int: "number", float: "number"}.get(annotation, "value")
