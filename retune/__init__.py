"""retune: from raw training data to a better retrieval model."""

__version__ = "0.1.0"

# What `from retune import …` offers, and the module behind it: nothing is imported before it is asked for.
_OFFERED = {
    "Embedder": "model.embedder",
    "Reranker": "model.reranker",
    "mix_models": "cocktail",
    "mix_models_by_layers": "cocktail",
    "mix_models_with_data": "cocktail",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _OFFERED:
        raise AttributeError(f"module 'retune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"retune.{_OFFERED[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFERED])
