"""Models in, their weighted sum out: LM-Cocktail's mix_models and mix_models_with_data.

The models must be of one architecture; names, shapes and kinds of all weights are compared before any
is read.  --weights says how much of each model the mixture gets; with --example_data it is
softmax(−loss / temperature) of each model's loss on the examples.  Heads (BGE-M3's, a reranker's) are
merged too; configuration, tokenizer and prompts are the first model's.  Memory is that of a piece of a
tensor; with --example_data that of one model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from retune import cocktail
from retune.commands import models
from retune.commands.flags import Flag, Given, whole
from retune.commands.work import check_writable
from retune.data import examples
from retune.runtime import UserError, log

EXAMPLES = "examples"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


FLAGS = [
    Flag(("model_names_or_paths",), "The models: folders, hub ids or `package:<python package>`.", kind="list",
         required=True),
    Flag(("model_type",), "`encoder` for embedders, `decoder` for language models, `reranker`.", required=True,
         choices=tuple(cocktail.CLASSES)),
    Flag(("weights",), "One for each model, in their order; they should sum to 1. Either these or --example_data.",
         "merge.weights", "list", convert=_number, shown="those that follow from --example_data"),
    Flag(("output_path",), "Folder of the mixture; a model that it holds is replaced.", required=True),
    Flag(("example_data",), "JSONL of rows {query, pos, neg}, or {input, output} for language models.",
         group=EXAMPLES),
    Flag(("temperature",), "Losses are divided by it: the higher, the more equal the weights.", default=5.0,
         convert=_number, group=EXAMPLES),
    Flag(("batch_size",), "Examples of one forward pass; it does not change the weights.", default=2,
         convert=whole(1), group=EXAMPLES),
    Flag(("max_input_length",), "Tokens of a text at most; fewer where a model takes no more.", default=2048,
         convert=whole(8), group=EXAMPLES),
    Flag(("neg_number",), "Negatives of a query at most, the first ones.", default=7, convert=whole(0),
         group=EXAMPLES),
    Flag(("trust_remote_code",), "Run modelling code that comes with the checkpoints, for their losses.",
         kind="bool", default=False, group=EXAMPLES),
    models.CACHE_DIR,
]  # fmt: skip
LIMITS = ("batch_size", "max_input_length", "neg_number", "trust_remote_code")


def run(given: Given) -> None:
    """Merge as the flags say.

    Raises:
        UserError: for a mistake in flags or examples, and models that do not fit together; an earlier model is left
            as it was.
    """
    names, output = given["model_names_or_paths"], Path(given["output_path"]).expanduser()
    if given.typed("weights") == given.typed("example_data"):
        both = "not both" if given.typed("weights") else "found neither"
        raise UserError(f"--weights, --example_data: expected one of them, {both}")
    if output.exists() and not output.is_dir():
        raise given.mistake("output_path", f"{output}: expected a folder, found a file")
    check_writable(output, given, "output_path")
    models.use_cache(given)
    cocktail.check_type(given["model_type"], names)
    weights = given["weights"] or _weighed(given)
    cocktail.write(names, given["model_type"], weights, output)
    log.info("%s: the mixture", output)


def _weighed(given: Given) -> list[float]:
    """The weights that follow from the examples."""
    rows = examples.read(Path(given["example_data"]).expanduser())
    limits = {name: given[name] for name in LIMITS}
    names = given["model_names_or_paths"]
    return cocktail.weigh(names, given["model_type"], rows, given["temperature"], **limits)
