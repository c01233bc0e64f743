"""LM-Cocktail's functions (arXiv:2311.13534): several models in, their mixture out, on disk and loaded.

    from retune import mix_models, mix_models_with_data

The sum is taken file to file; the one model in memory is the mixture that is returned, and with
examples each model in turn while its loss is measured.  The configuration, tokenizer and prompts of the
mixture are those of the first model.  `retune merge` does the same and loads nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retune.commands.placing import place
from retune.model import checkpoint
from retune.model.mixture import mix
from retune.runtime import UserError, make_folder

# transformers' class of what is returned
CLASSES = {
    "encoder": "AutoModel", "decoder": "AutoModelForCausalLM", "reranker": "AutoModelForSequenceClassification",
}  # fmt: skip
SPEAKING = ("ForCausalLM", "LMHeadModel")


def mix_models(
    model_names_or_paths: Sequence[str], model_type: str, weights: Sequence[float], output_path: str | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The weighted sum of models of one architecture.

    Args:
        model_names_or_paths: folders, hub ids or `package:<python package>`.
        model_type: `encoder` (an embedder), `decoder` (a language model) or `reranker`.
        weights: one for each model; they should sum to 1.
        output_path: folder of the mixture; where not given it is only returned.
        trust_remote_code: run modelling code that comes with the checkpoints.

    Returns:
        The mixture as transformers loads it: AutoModel, AutoModelForCausalLM or AutoModelForSequenceClassification.

    Raises:
        retune.runtime.UserError: for models that do not fit together, and weights that cannot be.
    """
    check_type(model_type, model_names_or_paths)
    _tell(model_names_or_paths, weights)
    if output_path is not None:
        write(model_names_or_paths, model_type, weights, Path(output_path))
        return _load(Path(output_path), model_type, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="retune-mixture-") as folder:
        write(model_names_or_paths, model_type, weights, Path(folder) / "model")
        return _load(Path(folder) / "model", model_type, trust_remote_code)


def mix_models_with_data(
    model_names_or_paths: Sequence[str], model_type: str, example_data: Sequence[Mapping[str, Any]] | None = None,
    temperature: float = 5.0, batch_size: int = 2, max_input_length: int = 2048, neg_number: int = 7,
    output_path: str | None = None, trust_remote_code: bool = False,
    example_ata: Sequence[Mapping[str, Any]] | None = None,
) -> Any:  # fmt: skip
    """The sum of models, weighted with softmax(−loss / temperature) of their losses on a few examples.

    Args:
        model_names_or_paths, model_type, output_path, trust_remote_code: see `mix_models`.
        example_data: {"query": str, "pos": [str], "neg": [str]} each, and {"input": str, "output": str} for decoders.
        temperature: the higher, the more equal the weights.
        batch_size: examples of one forward pass; it does not change the weights.
        max_input_length: tokens of a text at most; fewer where a model takes no more.
        neg_number: negatives of a query at most, the first ones.
        example_ata: `example_data`, as LM-Cocktail's first release spells it.

    Returns:
        See `mix_models`.

    Raises:
        retune.runtime.UserError: see `mix_models`; and for examples of another form.
    """
    if (example_data is None) == (example_ata is None):
        raise UserError("mix_models_with_data: expected example_data")
    rows = [(f"example_data[{place}]", row) for place, row in enumerate(example_data or example_ata or ())]
    limits = {"batch_size": batch_size, "max_input_length": max_input_length, "neg_number": neg_number}
    weights = weigh(model_names_or_paths, model_type, rows, temperature, trust_remote_code=trust_remote_code, **limits)
    return mix_models(model_names_or_paths, model_type, weights, output_path, trust_remote_code)


def mix_models_by_layers(
    model_names_or_paths: Sequence[str], model_type: str, weights: Sequence[float], output_path: str | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """`mix_models`, by the name that LM-Cocktail has for the form which saves memory: here every form does.

    Args, Returns, Raises: see `mix_models`; there is one weight for each model, not for each layer.
    """
    return mix_models(model_names_or_paths, model_type, weights, output_path, trust_remote_code)


# ---- what the command shares --------------------------------------------------------------------


def weigh(
    models: Sequence[str], model_type: str, rows: Sequence[tuple[str, Any]], temperature: float, **limits: Any
) -> list[float]:
    """Merging weights from losses on examples; see `training.appraisal`."""
    from retune.training.appraisal import Limits, losses, shares

    check_type(model_type, models)
    if temperature <= 0:
        raise UserError(f"temperature: expected a number above 0, found {temperature}")
    return shares(losses(models, model_type, rows, Limits(**limits)), temperature)


def write(models: Sequence[str], model_type: str, weights: Sequence[float], out: Path) -> None:
    """Put the mixture into the folder `out`, in place of a model that it holds; other files there stay.

    An encoder that does not say how it pools becomes one that takes the first token's vector and scales it to length
    1, as LM-Cocktail leaves every encoder.
    """
    made = not out.exists()
    make_folder(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".mixture-", dir=out) as folder:
            part = Path(folder) / "model"
            mix(models, weights, part, donor=0)
            if model_type == "encoder":
                _as_embedder(part, models, weights)
            else:
                _described(part, model_type, models, weights)
            place(part, None, out)
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _as_embedder(folder: Path, models: Sequence[str], weights: Sequence[float]) -> None:
    """Complete an encoder's folder by how it pools, where it does not say, and a model card."""
    from retune.stages.card import card

    said = checkpoint.card(folder)
    if said.pooling is None:
        said = replace(said, pooling="cls", normalize=True, max_length=said.max_length or 512)
        checkpoint.write_card(folder, said, checkpoint.read_json(folder / "config.json")["hidden_size"])
    names = [str(model) for model in models]
    settings = {"base": names[0], "sections": {}, "models": names, "weights": list(weights)}
    card(kind="merged", name="merged model", model=folder, settings=settings, out=folder / "README.md")


def _described(folder: Path, model_type: str, models: Sequence[str], weights: Sequence[float]) -> None:
    """Complete the folder of a reranker or language model by a model card."""
    from retune.stages.card import describe

    names = [str(model) for model in models]
    describe(kind=model_type, loader=_class(folder, model_type), models=names, weights=list(weights), folder=folder)


def check_type(model_type: str, models: Sequence[str]) -> None:
    """Raise a UserError for a type that is not known, or that the first model is not of."""
    if model_type not in CLASSES:
        raise UserError(f"model_type: expected one of {', '.join(CLASSES)}; found {model_type!r}")
    if not models:
        raise UserError("model_names_or_paths: expected at least one model")
    kind = _architecture(checkpoint.resolve(models[0]))
    wanted = {"decoder": SPEAKING, "reranker": ("ForSequenceClassification", *SPEAKING)}.get(model_type)
    if wanted and kind and not kind.endswith(wanted):
        raise UserError(f"model_type: {models[0]} is a {kind}, which is no {model_type}")


def _architecture(folder: Path) -> str:
    return (checkpoint.read_json(folder / "config.json").get("architectures") or [""])[0]


def _class(folder: Path, model_type: str) -> str:
    """transformers' class of a mixture; a reranker may be a language model."""
    decodes = model_type == "reranker" and _architecture(folder).endswith(SPEAKING)
    return CLASSES["decoder" if decodes else model_type]


def _tell(models: Sequence[str], weights: Sequence[float]) -> None:
    for model, weight in zip(models, weights, strict=False):
        print(f"weight {weight:.4f}: {model}")


def _load(folder: Path, model_type: str, trust_remote_code: bool) -> Any:
    import transformers

    from retune.model.backbone import load_whole

    kind = getattr(transformers, _class(folder, model_type))
    if model_type == "encoder":  # a pooler may be lacking: no vector goes through it
        return kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return load_whole(kind, folder, trust_remote_code=trust_remote_code)
