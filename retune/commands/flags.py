"""Flags of a command: a table of rows, most of them made from the config's own keys.

A flag that sets a config key has its default, its help and its check from there, so that command
and config cannot drift apart.  A mistake is one line that names the flag as it was typed.  Knows
nothing of stages; imports nothing heavy, so that `--help` is there at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from retune.config import Section
from retune.runtime import UserError
from retune.sections.base import fields_of

TRUE, FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")
AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Flag:
    """A row of a command's table.

    Attributes:
        names: all spellings, without dashes and with `_`; help shows them in this order.
        key: the config key that it sets, such as `mine.negative_number`.
        kind: "value", "list" (one or more values) or "bool" (`--x`, `--x True`, `--x False`, `--no_x`).
        default: what holds where it is not given; None leaves it to the config.
        shown: the default as help shows it, where `default` does not say.
        choices: shown, and checked, where they are few.
        convert: makes the value that the config understands from what was typed.
    """

    names: tuple[str, ...]
    help: str
    key: str | None = None
    kind: Literal["value", "list", "bool"] = "value"
    default: Any = None
    shown: str | None = None
    choices: tuple[Any, ...] = ()
    required: bool = False
    convert: Callable[[Any], Any] | None = None
    group: str = "files"

    @property
    def name(self) -> str:
        return self.names[0]


def from_section(
    section: str, config: type[Section], group: str, rows: Mapping[str, Mapping[str, Any]] | None = None,
    names: Callable[[str], tuple[str, ...]] = lambda field: (field,), leave: Iterable[str] = (),
) -> list[Flag]:  # fmt: skip
    """A flag for each key of a config section, in its order.

    Args:
        section: the section's name in the config.
        rows: {key: what its flag has that the config does not say, such as other names or another default}.
        names: spellings of a key that `rows` does not name.
        leave: keys without a flag.
    """
    rows, leave, found = rows or {}, set(leave), []
    for field, info in fields_of(config).items():
        if field in leave:
            continue
        kind, choices = _kind(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        if choices and default is not None and type(None) in get_args(info.annotation):
            choices = (*choices, None)  # there is no other way to ask for it
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        flag = Flag(
            names(field), info.description or "", f"{section}.{field}", kind, shown=shown, choices=choices, group=group
        )
        found.append(replace(flag, **rows.get(field, {})))
    return found


def _kind(annotation: Any) -> tuple[Literal["value", "list", "bool"], tuple[Any, ...]]:
    """(kind of flag, choices) of a config key's type."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [one for one in get_args(annotation) if one is not type(None)]
        kind, choices = _kind(parts[0])
        return kind, (*choices, True, False) if choices and bool in parts else choices
    if get_origin(annotation) is Literal:
        return "value", get_args(annotation)
    return ("bool" if annotation is bool else "list" if get_origin(annotation) is list else "value"), ()


class Given:
    """What a user typed, by any of a flag's names: `given["negative_number"]`, its default where it was not typed."""

    def __init__(self, flags: Sequence[Flag], values: Mapping[str, Any], typed: Mapping[str, str]) -> None:
        self._by_name = {name: flag for flag in flags for name in flag.names}
        self.flags, self._values, self._typed = list(flags), values, typed

    def __getitem__(self, name: str) -> Any:
        flag = self._by_name[name]
        return self._values.get(flag.name, flag.default)

    def typed(self, name: str) -> bool:
        """Whether the flag was given."""
        return name in self._by_name and self._by_name[name].name in self._values

    def shown(self, name: str) -> str:
        """The flag as it was typed, or by its first name."""
        flag = self._by_name[name]
        return self._typed.get(flag.name, f"--{flag.name}")

    def mistake(self, name: str, text: str) -> UserError:
        return UserError(f"{self.shown(name)}: {text}")

    def section(self, section: str, config: type[AnySection], **fixed: Any) -> AnySection:
        """The config section that the flags make; `fixed` overrules them.

        Raises:
            UserError: with a line for each value that the section does not take.
        """
        of_key = {flag.key: flag for flag in self.flags if re.fullmatch(rf"{section}\.\w+", flag.key or "")}
        given = {key: flag.name for key, flag in of_key.items() if self.typed(flag.name) or self[flag.name] is not None}
        values = {key.rpartition(".")[2]: self[name] for key, name in given.items()}
        try:
            return config(**(values | fixed))
        except ValidationError as error:
            lines = dict.fromkeys(self._explain(one, section, of_key) for one in error.errors())
            raise UserError("\n".join(lines)) from None

    def _explain(self, error: Mapping[str, Any], section: str, of_key: Mapping[str, Flag]) -> str:
        flag = of_key.get(f"{section}.{error['loc'][0]}") if error["loc"] else None
        text = re.sub(r"^Input should be ", "expected ", error["msg"].removeprefix("Value error, "))
        if not error["loc"] and f"{section}.{text.split(':')[0]}" in of_key:  # of several keys; the first is named
            name, _, text = text.partition(": ")
            return f"{self.shown(of_key[f'{section}.{name}'].name)}: {text}"
        if error["type"] == "missing":
            text = "required, but not given"
        elif "found" not in text and not isinstance(error["input"], dict):
            text += f", found {error['input']!r}"
        return f"{self.shown(flag.name) if flag else section.rpartition('.')[2]}: {text}"

    def in_flags(self, message: str) -> str:
        """A stage's message with the flags in place of the config keys which they set."""
        for flag in self.flags:
            if flag.key:
                shown, key = self.shown(flag.name), re.escape(flag.key)
                message = re.sub(rf"`{key}: (\w+)`", rf"`{shown} \1`", message)
                message = re.sub(rf"(?<![\w.]){key}(?!\w|\.\w)", shown, message)
        return message


def whole(least: int) -> Callable[[str], int]:
    """A converter for flags that are whole numbers."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, found {text!r}")
        return int(text)

    return convert


# ---- parsing ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A mistake is an error for the caller, not the end of the process; `words` are what was typed."""

    words: Sequence[str] = ()

    def error(self, message: str) -> None:
        if found := re.match(r"argument ([^:]+): (.*)", message, re.S):
            names = found[1].split("/")
            typed = [name for name in names if any(word.split("=")[0] == name for word in self.words)]
            message = f"{(typed or names)[-1 if typed else 0]}: {found[2]}"
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` shows all flags")


class _Store(argparse.Action):
    """Stores a value, and how the flag was typed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.typed_flags[self.dest] = option_string


class _StoreFalse(_Store):
    """`--no_x`, which takes no value."""

    def __init__(self, option_strings, dest, **options) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        super().__call__(parser, namespace, False, option_string)


class _Help(argparse.HelpFormatter):
    """All spellings of a flag, then its value once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


def parser(command: str, flags: Sequence[Flag], about: str) -> _Parser:
    """The parser of a command; `about` is what `--help` says first."""
    found = _Parser(
        f"retune {command}", usage=f"retune {command} --flag value …", formatter_class=_Help, allow_abbrev=False,
        description=textwrap.dedent(about),
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = found.add_argument_group(flag.group)
        _add(groups[flag.group], flag)
    return found


def _add(group: Any, flag: Flag) -> None:
    shown = flag.shown if flag.default is None else flag.default
    default = "required" if flag.required else f"default: {'none' if shown in (None, 'None') else shown}"
    options: dict[str, Any] = {
        "dest": flag.name, "action": _Store, "default": argparse.SUPPRESS, "required": flag.required,
        "help": f"{flag.help} ({default})".replace("%", "%%"), "metavar": "VALUE",
    }  # fmt: skip
    if flag.kind == "bool":
        options |= {"nargs": "?", "const": True, "type": _truth, "metavar": "BOOL"}
    elif flag.kind == "list":
        options |= {"nargs": "+"}
    elif flag.choices:
        options |= {"metavar": "{" + ",".join(map(str, flag.choices)) + "}", "type": _chooser(flag)}
    if flag.convert:
        options["type"] = flag.convert
    group.add_argument(*(f"--{name}" for name in flag.names), **options)
    if flag.kind == "bool":
        no = (f"--no_{name}" for name in flag.names)
        group.add_argument(*no, dest=flag.name, action=_StoreFalse, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _truth(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() in TRUE


def _chooser(flag: Flag) -> Callable[[str], Any]:
    by_name = {str(choice): choice for choice in flag.choices}

    def choose(text: str) -> Any:
        name = text if text in by_name else text.capitalize()  # true is True
        if name not in by_name:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(by_name)}; found {text!r}")
        return by_name[name]

    return choose


def parse(
    command: str, flags: Sequence[Flag], about: str, argv: Sequence[str],
    further: Callable[[], list[Flag]] | None = None,
) -> Given:  # fmt: skip
    """Read a command's flags; `-` and `_` in a name are the same, and so are `--flag value` and `--flag=value`.

    Args:
        further: more flags, asked for where one is not among `flags`.

    Raises:
        UserError: for an unknown flag, naming the nearest known one, or a value that a flag does not take.
    """
    argv = [re.sub(r"^--[^=\s]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    names = [re.split(r"[=\s]", word[2:])[0] for word in argv if word.startswith("--")]
    known, unknown = _sorted_out(names, flags)
    if unknown and further:
        flags = [*flags, *further()]
        known, unknown = _sorted_out(names, flags)
    if unknown:
        raise UserError("\n".join(f"retune {command}: unknown flag --{name}{_near(name, known)}" for name in unknown))
    namespace, reader = argparse.Namespace(typed_flags={}), parser(command, flags, about)
    reader.words = argv
    _, rest = reader.parse_known_args(argv, namespace)
    if rest:
        raise UserError(f"retune {command}: unexpected {rest[0]!r}: a value comes after its --flag")
    typed = namespace.typed_flags
    return Given(flags, {name: value for name, value in vars(namespace).items() if name in typed}, typed)


def _sorted_out(names: Sequence[str], flags: Sequence[Flag]) -> tuple[dict[str, Flag], list[str]]:
    """The flags by all their names, and those of `names` that are not among them."""
    known = {name: flag for flag in flags for name in flag.names}
    known |= {f"no_{name}": flag for name, flag in known.items() if flag.kind == "bool"}
    return known, list(dict.fromkeys(name for name in names if name and name not in known and name != "help"))


def _near(name: str, known: Mapping[str, Flag]) -> str:
    begun = [one for one in known if one.startswith(name)]
    if near := begun or difflib.get_close_matches(name, known, 1, 0.6):
        return f"; did you mean --{near[0]}?"
    return "; `--help` shows all flags"
