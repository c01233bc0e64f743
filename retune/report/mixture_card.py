"""A short card of a mixture that is no embedder: the models and weights it was made of, and the class that loads it.

Knows facts alone, as `card` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from retune.report.card import HERE, mixture

TASKS = {"reranker": "text-ranking", "decoder": "text-generation"}  # the hub's names
WHAT = {
    "reranker": "A reranker: it scores how well a passage answers a query.",
    "decoder": "A language model: it goes on with a text.",
}
RERANKS = """
from retune import Reranker

model = Reranker.load("{here}")
print(model.score([("what is asked", "a passage"), ("what is asked", "another one")]))
"""
SPEAKS = """
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{here}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{here}"{trust})
answer = model.generate(**tokenizer("what is asked", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""
CODE = {"reranker": RERANKS, "decoder": SPEAKS}


@dataclass(frozen=True)
class Mixture:
    """What the card says."""

    kind: str
    """`reranker` or `decoder`."""
    loader: str
    """transformers' class."""
    parts: Sequence[tuple[float, str]]
    """(weight, model)."""
    hub_ids: Sequence[str]
    """Of the models that are on the hub."""
    remote_code: bool
    """Whether its class comes with a checkpoint of its kind."""
    version: str


def mixture_card(facts: Mixture) -> str:
    """The whole card."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag=TASKS[facts.kind], tags=[facts.kind, "merged"],
        **({"base_model": list(facts.hub_ids), "base_model_relation": "merge"} if facts.hub_ids else {}),
    )  # fmt: skip
    trust = ", trust_remote_code=True" if facts.remote_code else ""
    code = CODE[facts.kind].format(here=HERE, loader=facts.loader, trust=trust)
    loads = f"transformers loads it with `{facts.loader}.from_pretrained`"
    if facts.kind == "reranker" and facts.loader == "AutoModelForSequenceClassification":
        loads += ", sentence-transformers with `CrossEncoder`"
    parts = [
        f"# merged {facts.kind}",
        f"{WHAT[facts.kind]} It is a weighted sum of models; configuration and tokenizer are the first one's.",
        mixture(facts.parts),
        "## Use",
        f"```python{code}```",
        f"{loads}{' and `trust_remote_code=True`' if trust else ''}.",
        f"Made by retune {facts.version}.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
