"""Losses and what they need: tensors in, scalars out. Knows nothing of models."""
