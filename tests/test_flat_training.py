"""Training over flat tokens: the gradients of the model's own forward, and a dropout that is one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny import some_texts, tiny_bert, tiny_m3
from torch import Tensor

from retune.config import EmbedderConfig, TrainConfig
from retune.model import trainable
from retune.model.backbone import set_dropout
from retune.model.embedder import Embedder
from retune.model.flat_training import FlatTraining, _Dropped, kept_values
from retune.model.fused import Flat
from retune.model.multihead import represent
from retune.model.pooling import of_flat

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("models")
    tiny_bert(found / "bert")
    tiny_m3(found / "roberta")
    return found


def model(folder: Path, kind: str = "bert", pooling: str = "mean", **training) -> Embedder:
    family = "m3" if kind == "roberta" else "encoder"
    settings = EmbedderConfig(model=str(folder / kind), pooling=pooling, family=family)
    return trainable.load(settings, TrainConfig(**{"dropout": 0.0} | training), 0, CPU).train()


def batch(model: Embedder, n: int = 9) -> dict[str, Tensor]:
    """Texts of several lengths, some of them equal, in no order."""
    tokens = model.tokenize(some_texts(n, longest=12) * 2, "passage")
    width = int(tokens.lengths.max())
    ids = torch.full((2 * n, width), model.pad_token_id)
    for row in range(2 * n):
        own = torch.from_numpy(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].astype("int64"))
        ids[row, : len(own)] = own
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor(tokens.lengths)[:, None]).long()}


def gradients(model: Embedder, out: Tensor) -> dict[str, Tensor]:
    """Of a sum whose terms differ in weight."""
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_gradients_are_those_of_the_models_own_forward(folder, kind, pooling, padded):
    one = model(folder, kind, pooling)
    given = batch(one)
    if not padded:
        given = {"input_ids": given["input_ids"][:, :4]}
    assert isinstance(one.shortcut.of(one.backbone, given.get("attention_mask")), FlatTraining)
    out = one(**given)
    found = gradients(one, out)
    one.shortcut.enabled = False
    plain = one(**given)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    close(found, gradients(one, plain))


def test_segments_and_heads_have_the_models_own_gradients(folder):
    one = model(folder, "roberta", "cls", unified_finetuning=True, colbert_dim=8)
    given, found = batch(one), []
    for one.shortcut.enabled in (True, False):
        parts = represent(one, **given)
        found.append(gradients(one, torch.cat([parts[name].flatten() for name in ("dense", "sparse", "colbert")])))
    close(*found)
    bert = model(folder)
    given = batch(bert)
    types = torch.arange(given["input_ids"].shape[1]).expand_as(given["input_ids"]) % 2
    flat = Flat.of(**given, type_ids=types)
    found = gradients(bert, of_flat("mean", FlatTraining(bert.backbone)(flat), flat))
    hidden = bert.backbone(**given, token_type_ids=types).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1)
    close(found, gradients(bert, (hidden * mask).sum(1) / mask.sum(1)))


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_recomputed_layers_change_nothing(folder, options, monkeypatch):
    """Bit for bit, with dropout; layers do compute twice."""
    one = model(folder, dropout=0.2)
    given, plain, calls = batch(one), FlatTraining._layer, []
    monkeypatch.setattr(FlatTraining, "_layer", lambda *args: calls.append(1) or plain(*args))

    def drawn() -> dict[str, Tensor]:
        torch.manual_seed(1)
        return gradients(one, one(**given))

    kept = drawn()
    layers = len(calls)
    one.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    recomputed = drawn()
    assert layers and len(calls) == 3 * layers
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept | recomputed)


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_value_is_kept_on_its_own_with_the_same_probability(p):
    n = 400_000
    torch.manual_seed(3)
    kept = kept_values(n, p).double() - (1 - p)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean()) < 5 * deviation / n**0.5 + 1 / 65536
    for lag in (1, 2, 3, 4, 8, 64, 384):  # neighbours come from one word of 64 bits
        assert abs((kept[lag:] * kept[:-lag]).mean()) < 5 * deviation**2 / n**0.5 + 1 / 65536
    again = kept_values(n, p)
    assert not torch.equal(again.double() - (1 - p), kept), "every call draws anew"
    torch.manual_seed(3)
    assert torch.equal(kept_values(n, p).double() - (1 - p), kept), "from torch's own random state"


def test_all_or_nothing():
    assert not kept_values(10, 1.0).any() and kept_values(10, 0.0).all() and len(kept_values(7, 0.5)) == 7
    assert not kept_values(10, 1 - 1e-9).any()
    assert torch.equal(_Dropped.apply(torch.ones(4), kept_values(4, 1.0), 1.0), torch.zeros(4))


def test_what_is_kept_is_scaled_and_the_gradient_with_it():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    kept = kept_values(30, 0.25).view(6, 5)
    torch.testing.assert_close(_Dropped.apply(x, kept, 0.25), torch.where(kept, x / 0.75, 0.0))
    assert torch.autograd.gradcheck(lambda x: _Dropped.apply(x, kept, 0.25), (x,))


def test_dropout_is_where_the_model_has_it(folder):
    """One at a time: the vectors vary; none in evaluation."""
    one = model(folder)
    given = batch(one)
    places = [name for name, module in one.backbone.named_modules() if isinstance(module, torch.nn.Dropout)]
    places = [name for name in places if not name.startswith("pooler")]
    layers = len(one.backbone.encoder.layer)
    assert len(places) == 1 + 3 * layers
    still = one(**given)
    for name in places:
        module = one.backbone.get_submodule(name)
        module.p = 0.5
        assert not torch.allclose(one(**given), one(**given), atol=1e-4), name
        module.eval()
        assert torch.equal(one(**given), still), name
        module.p = 0.0
        module.train()


def test_dropout_spreads_vectors_as_torchs_does(folder):
    one = model(folder)
    set_dropout(one.backbone, 0.3)
    given = batch(one, 2)
    moments = []
    for one.shortcut.enabled in (True, False):
        torch.manual_seed(0)
        drawn = torch.stack([one(**given).detach() for _ in range(600)])
        moments.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (wanted, wanted_spread) = moments
    assert (mean - wanted).abs().max() < 6 * wanted_spread.max() / 600**0.5
    torch.testing.assert_close(spread, wanted_spread, rtol=0.2, atol=0.005)
    assert wanted_spread.mean() > 0.02


# ---- where it is used ---------------------------------------------------------------------------


def test_other_models_and_other_times_go_through_the_models_own_forward(folder, caplog):
    one = model(folder)
    used = one.shortcut.of
    assert used(one.backbone) is not None
    assert used(one.backbone.eval()) is None, "gradients of a model that is not in training"
    one.backbone.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert used(one.backbone) is None
    assert used(one.backbone, torch.tensor([[1, 1], [0, 0]])) is None, "a text without tokens"
    one.backbone.encoder.layer[0].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "retune"):
        assert used(one.backbone) is None and used(one.backbone) is None
    assert caplog.text.count("training by the model's own forward: it has hooks") == 1
    half = model(folder).to(torch.bfloat16)
    assert half.shortcut.of(half.backbone) is None
    adapters = model(folder, use_lora=True)
    assert adapters.shortcut.of(adapters.backbone) is None
