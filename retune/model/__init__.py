"""Prompts, backbones, pooling, embedders and rerankers. Knows nothing of losses."""
