"""Merging of tokens is the mean of groups, row by row; the loop over layers is the model's own forward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from retune.model import layers
from retune.model.layers import LayerScores, last_tokens, merge_tokens
from retune.runtime import UserError

TEXTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=6)


@settings(deadline=None)
@given(TEXTS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 5))
def test_merging_equals_means_of_slices(texts, ratio, padding):
    """texts: tokens before the passage, in it, after it."""
    width = max(map(sum, texts)) + padding
    hidden = torch.randn(len(texts), width, 3, generator=torch.Generator().manual_seed(0))
    passage = torch.zeros(len(texts), width, dtype=torch.long)
    for row, (before, inside, _) in enumerate(texts):
        passage[row, before : before + inside] = 1
    last = torch.tensor([sum(text) - 1 for text in texts])
    merged, new_last, new_passage = merge_tokens(hidden, last, passage, ratio)
    assert merged.shape[1] == int(new_last.max()) + 1
    for row, (before, inside, after) in enumerate(texts):
        groups = [hidden[row, before + at : before + min(at + ratio, inside)].mean(0) for at in range(0, inside, ratio)]
        end = before + inside
        expected = [*hidden[row, :before], *groups, *hidden[row, end : end + after]]
        assert int(new_last[row]) + 1 == len(expected)
        torch.testing.assert_close(merged[row, : len(expected)], torch.stack(expected))
        assert new_passage[row, : len(expected)].tolist() == [0] * before + [1] * len(groups) + [0] * after


def test_merging_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [6.0], [9.0], [7.0]]])
    merged, last, passage = merge_tokens(hidden, torch.tensor([5]), torch.tensor([[0, 1, 1, 1, 0, 0]]), 2)
    assert merged.flatten().tolist() == [1, 3, 6, 9, 7]
    assert last.tolist() == [4] and passage.tolist() == [[0, 1, 1, 0, 0]]


def test_last_tokens():
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert last_tokens(ids, None).tolist() == [3, 3]
    assert last_tokens(ids, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])).tolist() == [1, 3]


def test_a_model_whose_forward_is_another_is_not_read_by_layers(monkeypatch):
    config = AutoConfig.for_model(
        "llama", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModel.from_config(config)
    LayerScores(model, torch.zeros(1, 16), [2])
    plain = layers.embed
    monkeypatch.setattr(layers, "embed", lambda model, ids: 3 * plain(model, ids) + 1)
    with pytest.raises(UserError, match="its forward differs"):
        LayerScores(AutoModel.from_config(config), torch.zeros(1, 16), [2])


def test_gradients_reach_layers_and_vectors():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    scores = LayerScores(AutoModel.from_config(config), torch.randn(2, 16), [1, 2], merge_after=[1], ratio=2)
    passage = torch.tensor([[0, 1, 1, 1, 0]])
    scores(torch.arange(5)[None], None, passage).sum().backward()
    assert scores.vectors.grad.abs().sum() > 0
    assert scores.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
