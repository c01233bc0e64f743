"""retune: from raw training data to a better retrieval model."""

__version__ = "0.1.0"
