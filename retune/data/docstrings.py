"""Docstrings of installed Python code as (summary, rest) pairs: real text that every Python machine has.

Sources are parsed with `ast` and never imported: importing runs code, and takes minutes for the
large packages.  Knows nothing of training or of splits.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from retune.runtime import UserError

# Tests, vendored copies and whatever else repeats other packages' docstrings or documents nothing.
SKIPPED = frozenset(
    {"test", "tests", "testing", "_testing", "_vendor", "vendor", "_vendored", "vendored", "extern", "externals"}
    | {"_externals", "third_party", "_bundled", "lib2to3", "idlelib", "turtledemo", "site-packages", "dist-packages"}
)
QUERY_WORDS = (4, 30)
PASSAGE_WORDS = (15, 90)

STDLIB = "stdlib"


class Docstring(NamedTuple):
    """A docstring's summary sentence and the rest of it, as plain text."""

    summary: str
    rest: str


# ---- which files --------------------------------------------------------------------------------


def installed_packages(root: str = "retune") -> list[str]:
    """Distributions that `root` needs on this machine, extras left out, at any depth; sorted.

    `root` itself is not among them, so that an edit of it does not change the corpus.
    """
    found: set[str] = set()
    waiting = [root]
    while waiting:
        try:
            lines = metadata.requires(waiting.pop()) or []
        except metadata.PackageNotFoundError:  # needed elsewhere only, or absent
            continue
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and name not in found:
                found.add(name)
                waiting.append(name)
    return sorted(found)


def sources(packages: list[str] | None = None) -> dict[str, list[Path]]:
    """{top-level module: its source files, sorted}; the standard library's modules are `stdlib.<module>`.

    Args:
        packages: import names; the standard library and what retune installs where None.

    Raises:
        UserError: for a name that cannot be imported here or has no Python sources.
    """
    if packages is not None:
        return dict(sorted((name, _importable(name)) for name in packages))
    found: dict[str, list[Path]] = {}
    for name in installed_packages():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for file in distribution.files or []:
            if file.suffix == ".py" and file.parts[0] != ".." and not _skipped(file.parts):
                found.setdefault(file.parts[0].removesuffix(".py"), []).append(Path(distribution.locate_file(file)))
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        if parts[0].removesuffix(".py") in sys.stdlib_module_names and not _skipped(parts):
            found.setdefault(f"{STDLIB}.{parts[0].removesuffix('.py')}", []).append(path)
    return {name: sorted(found[name]) for name in sorted(found)}


def _skipped(parts: tuple[str, ...]) -> bool:
    return not SKIPPED.isdisjoint(parts) or parts[-1].startswith("test_") or parts[-1] == "conftest.py"


def _importable(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec and spec.submodule_search_locations:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        paths = [(path, path.relative_to(folder).parts) for folder in folders for path in folder.rglob("*.py")]
        found = sorted(path for path, parts in paths if not _skipped(parts))
    else:
        found = [Path(spec.origin)] if spec and (spec.origin or "").endswith(".py") else []
    if not found:
        raise UserError(f"demo.packages: {name}: no Python package of this name is installed here")
    return found


# ---- what they say ------------------------------------------------------------------------------


def docstrings(path: Path) -> Iterator[Docstring]:
    """The file's docstrings whose summary and rest are long enough to be a query and a passage, in line order."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in others' strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # templates, other versions' syntax
            return
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        if docstring and (pair := parse(docstring)):
            yield pair


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    """Modules, classes and functions; the insides of functions are left out."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    if isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):
        for child in node.body:
            yield from _documented(child)


# An empty line, or a line that opens a list of parameters, ends the first paragraph.
HEAD_END = re.compile(r"\n\s*\n|\n(?=\s*(?:[:@]\w|[-*] |Args|Parameters|Returns|Raises|Examples?:|>>>|\.\. |```))")

TAIL = re.compile(r"(?:\s*\b(?:See Also|Examples?|Notes?|References|Usage)\b:?)+\s*$")


def parse(docstring: str) -> Docstring | None:
    """Summary sentence and rest of a docstring; None where either is no sensible query or passage."""
    if len(docstring.split()) < QUERY_WORDS[0] + PASSAGE_WORDS[0]:
        return None  # markup only takes words away, and cleaning costs more than counting
    docstring = docstring.encode(errors="ignore").decode()  # lone surrogates, which no file can hold
    first, *others = HEAD_END.split(docstring.strip(), maxsplit=1)
    head, *tail = re.split(r"(?<=[.!?])\s+(?=[A-Z(])", plain(first), maxsplit=1)
    rest = TAIL.sub("", " ".join([*tail, *map(plain, others)]))
    words = rest.split()
    if not QUERY_WORDS[0] <= len(head.split()) <= QUERY_WORDS[1] or len(words) < PASSAGE_WORDS[0]:
        return None
    rest = " ".join(words[: PASSAGE_WORDS[1]])
    if normalised(head) in normalised(rest) or min(letters(head), letters(rest)) < 0.6:
        return None
    return Docstring(head, rest)


def normalised(text: str) -> str:
    """Words alone, in lower case: texts equal in this form are the same text."""
    return " ".join(re.findall(r"\w+", text.lower()))


def letters(text: str) -> float:
    """Share of letters among the characters that are not spaces: low for tables, formulas and code."""
    dense = "".join(text.split())
    return sum(map(str.isalpha, dense)) / max(len(dense), 1)


# Markup → plain text, in this order.  Blocks of code go: they repeat names, and nobody asks in code.
MARKUP = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"(?s)^[ \t]*```[^\n]*\n.*?(?:^[ \t]*```[ \t]*$|\Z)", ""),  # fenced code
        (r"(?s)^[ \t]*>>>.*?(?=\n[ \t]*\n|\Z)", ""),  # doctest with its output
        (r"^[ \t]*\.\. (?:version\w+|deprecated|index|image|plot|figure|currentmodule|_)[^\n]*$", ""),
        (
            r"(?s)^[ \t]*\.\. (?:code|code-block|sourcecode|math|testcode|highlight|toctree|auto\w+)::.*?(?=\n\S|\Z)",
            "",
        ),
        (r"^[ \t]*\.\. ([\w-]+)::", r"\1:"),  # note, warning, seealso …
        (r"^[ \t]*([=\-~^*#\"+`])\1{2,}[ \t]*$", ""),  # underlines
        (
            r"^[ \t]*[:@](?:param|arg|argument|keyword|kwarg|[ic]var)[ \t]+(?:[\w.\[\]| ]+[ \t]+)?(\*{0,2}\w+):",
            r"\1:",
        ),
        (r"^[ \t]*[:@](returns?|raises|yields|rtype|type)([^:\n]*):", r"\1\2:"),
        (r":(?:\w+:)?\w+:`~(?:[\w.]+\.)?(\w+)`", r"\1"),  # :class:`~package.Name`
        (r":(?:\w+:)?\w+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1"),  # :class:`Name`
        (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # `text <link>`_
        (r"\[`[~!]?([^\]`]+)`\](?:\([^)]*\))?", r"\1"),  # [`Name`]
        (r"\[([^\[\]\n]+)\]\([^)\s]*\)", r"\1"),  # [text](link)
        (r"[ \t]*\[[#\w]{1,4}\]_", ""),  # footnotes
        (r"</?\w+[^>\n]{0,40}>", ""),  # tags
        (r"https?://\S+", ""),
        (r"`{1,2}[~!]?([^`]+)`{1,2}_{0,2}", r"\1"),
        (r"(?<!\w)\*{1,2}(?=\S)([^*\n]+?)(?<=\S)\*{1,2}(?!\w)", r"\1"),  # emphasis
        (r"::(?=\s|$)", ":"),
        (r"\\([*_`])", r"\1"),
    )
]


def plain(text: str) -> str:
    """Text without reStructuredText, Markdown and doctest markup, its whitespace collapsed."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())
