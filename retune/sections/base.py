"""What all sections of the config share: strictness, and values that may be written in several ways."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of the config: unknown keys are mistakes, defaults are documented in the schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """A section's fields by key: its own, then those that it shares with other sections."""
    own = section.__annotations__
    return dict(sorted(section.model_fields.items(), key=lambda item: item[0] not in own))


def _window(value: Any) -> Any:
    """Accept `10-210` and `[10, 210]`; keep the written form `10-210`."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = f"{value[0]}-{value[1]}"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", value)
        if not match:
            raise ValueError("expected two numbers such as 10-210")
        if float(match[1]) >= float(match[2]):
            raise ValueError(f"expected the smaller number first, found {value}")
        return value
    raise ValueError("expected two numbers such as 10-210")


Window = Annotated[str, BeforeValidator(_window)]


def bounds(window: str) -> tuple[float, float]:
    """The two numbers of a window such as `10-210`."""
    low, high = window.split("-")
    return float(low), float(high)


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


def _numbers(value: Any) -> Any:
    """YAML reads `1e-5` as a string; make it the number that was meant, at any depth."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


def as_layers(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


TrainingArgs = Annotated[dict[str, Any], BeforeValidator(_numbers)]


def _two_places(value: str) -> str:
    value = with_newlines(value)
    if value.count("{}") != 2:
        raise ValueError("expected two places written {}: one for the instruction, one for the text")
    return value


def with_newlines(value: str) -> str:
    r"""`\n` written as two characters, as a shell or a quoted YAML string has it, is a line break."""
    return value.replace("\\n", "\n")


def _three_places(value: str) -> str:
    value = with_newlines(value)
    if value.count("{}") != 3:
        raise ValueError("expected three places written {}: for the instruction, the query and the response")
    return value


Template = Annotated[str, AfterValidator(_two_places)]
ExampleTemplate = Annotated[str, AfterValidator(_three_places)]
WithBreaks = Annotated[str, AfterValidator(with_newlines)]  # text in which `\\n` is a line break
