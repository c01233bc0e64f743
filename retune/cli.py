"""The command `retune`: one stage on plain files, or a look at configs and results.

The pipeline itself is run by Snakemake.  `retune COMMAND --help` shows a command's flags.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from retune import __version__
from retune.runtime import UserError, log, report_and_exit_code, start_logging


def check(args: argparse.Namespace) -> None:
    """Check a config and print it with all defaults filled in."""
    import yaml

    from retune.experiment import load

    try:
        raw = yaml.safe_load(Path(args.config).read_text())
    except FileNotFoundError:
        raise UserError(f"{args.config}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{args.config}: {getattr(error, 'strerror', None) or error}; expected a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{args.config}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{args.config}: expected a mapping of sections, found {type(raw).__name__}")
    for name, config in load(raw, [args.config]).runs.items():
        print(f"# {name}\n" + yaml.safe_dump(config.model_dump(mode="json", exclude={"variants"}), sort_keys=False))


def schema(args: argparse.Namespace) -> None:
    """Print the JSON schema of the config, for editors."""
    from retune.experiment import schema

    print(json.dumps(schema(), indent=2))


def reference(args: argparse.Namespace) -> None:
    """Print the reference page of the config."""
    from retune.reference import page

    print(page(), end="")


def summary(args: argparse.Namespace) -> None:
    """Print the metrics of a run and where its report is."""
    from retune.stages.metrics import summary

    folder = Path(args.folder)
    runs = [folder, *sorted(folder.parent.glob(f"{folder.name}.*"))]
    found = [(run, run / "evaluate/metrics.parquet") for run in runs if (run / "evaluate/metrics.parquet").is_file()]
    if not found:
        raise UserError(f"{folder}: no metrics here; expected results/<name> of a finished run")
    for run, metrics in found:
        print(f"\n{run.name}\n{summary(metrics, _guards(run / 'config.yaml'))}")
        if (run / "evaluate/gate.txt").is_file():
            print(f"\n{(run / 'evaluate/gate.txt').read_text()}")
        if (run / "report/index.html").is_file():
            print(f"report: {run / 'report/index.html'}")


def _guards(config: Path) -> list[str]:
    """Benchmarks that are guard sets, by the config that a run keeps beside its results."""
    import yaml

    kept = yaml.safe_load(config.read_text()) if config.is_file() else {}
    benchmarks = (kept.get("evaluate") or {}).get("benchmarks", {})
    return [name for name, benchmark in benchmarks.items() if benchmark.get("guard")]


LOOKS = {
    "check": (check, "config"),
    "schema": (schema, None),
    "reference": (reference, None),
    "summary": (summary, "folder"),
}
OPERANDS = {"config": "YAML file", "folder": "folder of a run, such as results/demo"}

# Each is a module of `retune.commands` with FLAGS and run (and further_flags, which FLAGS would be too slow to
# name); none is imported before it is asked for.
STAGES = {
    "mine": "Rows {query, pos, …} with mined hard negatives.",
    "score": "Rows {query, pos, neg, …} with a reranker's scores.",
    "train": "A tuned embedding model, from rows {query, pos, neg, …}.",
    "merge": "The weighted sum of models, with weights that are given or follow from a few examples.",
    "embed": "Vectors of queries or passages.",
    "split": "Rows by the number of their tokens, a file a length bin.",
    "evaluate": "How well a model retrieves: MRR, Recall and others on a benchmark.",
}
COMMANDS = {**{name: function.__doc__ for name, (function, _) in LOOKS.items()}, **STAGES}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="retune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"retune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in STAGES.items():
        commands.add_parser(name, help=about, add_help=False)
    for name, (function, operand) in LOOKS.items():
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        if operand:
            sub.add_argument(operand, help=OPERANDS[operand])
        sub.set_defaults(function=function)
    return top


def run_stage(name: str, argv: Sequence[str]) -> None:
    """Run one stage on plain files; what it says is in the words of the command's flags.

    Raises:
        UserError: likewise.
    """
    from retune.commands.flags import parse

    module = importlib.import_module(f"retune.commands.{name}")
    given = parse(name, module.FLAGS, module.__doc__, argv, getattr(module, "further_flags", None))

    def in_flags(record: logging.LogRecord) -> bool:
        record.msg, record.args = given.in_flags(record.getMessage()), None
        return True

    log.addFilter(in_flags)
    try:
        module.run(given)
    except UserError as error:
        raise UserError(given.in_flags(str(error))) from None
    finally:
        log.removeFilter(in_flags)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    start_logging()
    try:
        if argv and argv[0] in STAGES:
            run_stage(argv[0], argv[1:])
        else:
            args = parser().parse_args(argv)
            args.function(args)
    except BrokenPipeError:
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report_and_exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
