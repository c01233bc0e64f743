"""The training loop that the embedder and the reranker share."""
