"""BAAI's layerwise and lightweight checkpoints score as their code does, without it; other code if trusted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PAIRS, QUESTION, SHORT, Plain, adapters, tokens_of
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_decoder
from transformers import AutoTokenizer

from retune.config import RerankerConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError

CPU = torch.device("cpu")


def load(model: Path, **settings) -> Reranker:
    return Reranker.load(RerankerConfig(model=str(model), **{"max_length": 200, **settings}), target=CPU)


# ---- checkpoints with a head for each layer, as BAAI publishes them ------------------------------

PUBLISHED = {
    "minicpm": {
        "architectures": ["LayerWiseMiniCPMForCausalLM"], "model_type": "minicpm", "head_multi": True,
        "head_type": "simple", "start_layer": 2, "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 16,
        "hidden_act": "silu", "rope_scaling": None, "rope_theta": 10000.0, "pretraining_tp": 1,
        "num_key_value_heads": 2,
    },
    "cost_wise_gemma": {
        "architectures": ["CostWiseGemmaForCausalLM"], "model_type": "cost_wise_gemma", "layer_wise": True,
        "layer_sep": 1, "start_layer": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 5.0,
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip


def published(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """A tiny checkpoint with the config keys and weight names of a published one."""
    fast = byte_tokenizer(folder)
    kinds = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    code = {auto: f"BAAI/bge-{kind}--modeling_{kind}_reranker.{name}" for auto, name in kinds.items()}
    config = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "vocab_size": len(fast), "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "auto_map": code, **PUBLISHED[kind], **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    base = {"minicpm": "llama", "cost_wise_gemma": "gemma2"}[kind]
    options = {"num_key_value_heads": config["num_key_value_heads"]}
    layers = load_file(tiny_decoder(folder / "base", base, seed, **options) / "model.safetensors")
    weights = {name: value for name, value in layers.items() if not name.startswith("lm_head")}
    generator = torch.Generator().manual_seed(seed)
    for head in range(4 - config["start_layer"] + 1):
        weights[f"lm_head.{head}.linear_head.weight"] = torch.randn(1, 32, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def plainly(folder: Path, prompt: str, heads: dict[int, int], merge_after=(), ratio: int = 1) -> np.ndarray:
    """Scores of PAIRS by the plain decoder: the mean over {layer: head}."""
    config = json.loads((folder / "config.json").read_text())
    plain, tokenizer, found = Plain(folder, config), AutoTokenizer.from_pretrained(folder / "base"), []
    cap = config.get("final_logit_softcapping")
    for query, passage in PAIRS:
        ids, start, end = tokens_of(tokenizer, query, passage, prompt)
        states = plain.states(ids, start, end, merge_after, ratio)
        scores = [
            states[layer] @ plain.weights[f"lm_head.{head}.linear_head.weight"][0] for layer, head in heads.items()
        ]
        scores = [cap * torch.tanh(score / cap) if cap else score for score in scores]
        found.append(float(sum(scores) / len(scores)))
    return np.array(found)


@pytest.mark.parametrize(("cutoffs", "heads"), [(None, {4: 2}), ([2], {2: 0}), ([3], {3: 1}), ([4, 2], {2: 0, 4: 2})])
def test_minicpm_layerwise_as_published_without_its_code(tmp_path, cutoffs, heads):
    folder = published(tmp_path, "minicpm")
    ours = load(folder, cutoff_layers=cutoffs)
    assert ours.family == "decoder-only-layerwise"
    expected = plainly(folder, QUESTION, heads)
    assert np.ptp(expected) > 0.3
    tokens = ours.tokenize(*zip(*PAIRS, strict=True))
    for budget in (1, 700, 100_000):
        np.testing.assert_allclose(ours.scores(tokens, budget), expected, atol=1e-4)


def test_minicpm_with_one_head_for_all_layers(tmp_path):
    folder = published(tmp_path, "minicpm", head_multi=False)
    weights = load_file(folder / "model.safetensors")
    shared = weights.pop("lm_head.0.linear_head.weight")
    weights = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    save_file(weights | {"lm_head.linear_head.weight": shared}, folder / "model.safetensors", {"format": "pt"})
    found = load(folder, cutoff_layers=3).score(PAIRS)
    save_file(weights | {"lm_head.0.linear_head.weight": shared}, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_allclose(found, plainly(folder, QUESTION, {3: 0}), atol=1e-4)


@pytest.mark.parametrize(
    ("cutoffs", "heads", "ratio", "merge"),
    [
        (None, {4: 0}, 1, None), ([3], {3: 0}, 1, [2]), ([3], {3: 0}, 2, [1]), ([2, 4], {2: 0, 4: 1}, 4, [1, 2]),
        ([4], {4: 0}, 8, [1, 2, 3]), ([4], {4: 0}, 2, None),  # after layer 8, which is not there
    ],
)  # fmt: skip
def test_lightweight_as_published_without_its_code(tmp_path, cutoffs, heads, ratio, merge):
    folder = published(tmp_path, "cost_wise_gemma")
    ours = load(folder, cutoff_layers=cutoffs, compress_ratio=ratio, compress_layers=merge)
    assert ours.family == "decoder-only-lightweight"
    expected = plainly(folder, SHORT, heads, merge or [], ratio)
    assert np.ptp(expected) > 0.2
    tokens = ours.tokenize(*zip(*PAIRS, strict=True))
    for budget in (1, 700, 100_000):
        np.testing.assert_allclose(ours.scores(tokens, budget), expected, atol=1e-4)


def test_merging_changes_scores_and_a_passage_of_one_token_stays(tmp_path):
    folder = published(tmp_path, "cost_wise_gemma")
    whole, merged = (load(folder, compress_ratio=ratio, compress_layers=[1]).score(PAIRS) for ratio in (1, 2))
    assert np.abs(whole - merged).max() > 0.05


def test_adapters_of_a_published_checkpoint(tmp_path):
    from transformers import AutoModel

    folder = published(tmp_path, "minicpm")

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder / "base")

    lora = adapters(Named(), tmp_path / "lora")
    plain, expected = load(folder).score(PAIRS), load(folder, peft_path=str(lora)).score(PAIRS)
    assert np.abs(plain - expected).max() > 0.1
    weights, deltas = load_file(folder / "model.safetensors"), load_file(lora / "adapter_model.safetensors")
    for name in [name for name in deltas if "lora_A" in name]:
        change = 2 * deltas[name.replace("lora_A", "lora_B")] @ deltas[name]
        weights[name.removeprefix("base_model.model.").replace("lora_A.", "")] += change
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_allclose(load(folder).score(PAIRS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("minicpm", {"head_type": "raw"}, "a MiniCPM of head type raw"),
        ("minicpm", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled positions"),
        ("cost_wise_gemma", {"layer_wise": False}, "layer_wise: false"),
    ],
)
def test_relatives_of_the_published_that_are_not_known_are_errors(tmp_path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        load(published(tmp_path, kind, **changes))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_layer_without_a_head_is_an_error(tmp_path, kind):
    with pytest.raises(UserError, match=r"reranker\.cutoff_layers: .* can be read at layers 2 to 4, not at 1"):
        load(published(tmp_path, kind), cutoff_layers=[1, 3])


# ---- code of a checkpoint's own ------------------------------------------------------------------

CODE = """
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

    def __init__(self, vocab_size=10, num_hidden_layers=3, **other):
        self.vocab_size, self.num_hidden_layers = vocab_size, num_hidden_layers
        super().__init__(**other)


@dataclass
class Output(ModelOutput):
    logits: tuple = None
    attention_masks: tuple = None


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 4)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, output_hidden_states=None, cutoff_layers=None, **more):
        x = self.embed(input_ids)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        logits = [layer * mean[:, :, 0] for layer in cutoff_layers]
        assert output_hidden_states
        if not more:
            return Output(logits=tuple(logits))
        assert set(more) == {"compress_layer", "compress_ratio", "query_lengths", "prompt_lengths"}
        lengths = attention_mask.sum(1).tolist()
        text = zip(lengths, more["query_lengths"], more["prompt_lengths"])
        kept = [length - prompt for length, query, prompt in text]
        masks = (torch.arange(x.shape[1])[None] < torch.tensor(kept)[:, None]).long()
        factor = torch.tensor(more["query_lengths"])[:, None] + 100 * more["compress_ratio"]
        factor = factor + sum(more["compress_layer"])
        return Output(logits=tuple(factor * one for one in logits), attention_masks=(masks,) * len(logits))
"""


def stand_in(folder: Path, architecture: str) -> Path:
    fast = byte_tokenizer(folder)
    weight = torch.randn(len(fast), 4, generator=torch.Generator().manual_seed(0))
    save_file({"embed.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    (folder / "modeling_stand_in.py").write_text(CODE)
    maps = {"AutoConfig": "modeling_stand_in.StandInConfig", "AutoModelForCausalLM": "modeling_stand_in.StandIn"}
    config = {
        "model_type": "stand_in", "architectures": [architecture], "vocab_size": len(fast), "num_hidden_layers": 3,
        "auto_map": maps,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", ["LayerWiseThingForCausalLM", "CostWiseThingForCausalLM"])
def test_code_of_its_own_is_not_run_unless_trusted(tmp_path, architecture):
    folder = stand_in(tmp_path, architecture)
    (folder / "modeling_stand_in.py").write_text("raise SystemError('it ran')")
    message = r"only its own code \(modeling_stand_in\.py\) can run it; .* set reranker\.trust_remote_code: true"
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def modules_here(tmp_path, monkeypatch):
    """Code of checkpoints is copied where it is imported from: keep that in the test's folder."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules_here")
def test_trusted_code_of_a_layerwise_model_is_called_as_documented(tmp_path):
    folder = stand_in(tmp_path / "model", "LayerWiseThingForCausalLM")
    ours = load(folder, trust_remote_code=True, cutoff_layers=[1, 3])
    assert ours.family == "decoder-only-layerwise"
    tokenizer, weight = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")["embed.weight"]
    expected = [2 * float(weight[tokens_of(tokenizer, *pair)[0], 0].mean()) for pair in PAIRS]  # 2: mean of 1 and 3
    np.testing.assert_allclose(ours.score(PAIRS), expected, atol=1e-4)


@pytest.mark.usefixtures("modules_here")
def test_trusted_code_of_a_lightweight_model_is_called_as_documented(tmp_path):
    folder = stand_in(tmp_path / "model", "CostWiseThingForCausalLM")
    ours = load(folder, trust_remote_code=True, cutoff_layers=[2], compress_ratio=4, compress_layers=[1, 2])
    assert ours.family == "decoder-only-lightweight"
    tokenizer, weight = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")["embed.weight"]
    expected = []
    for pair in PAIRS:
        ids, start, end = tokens_of(tokenizer, *pair, SHORT)  # the stand-in reads the passage's last token
        expected.append(2 * (start + 400 + 3) * float(weight[ids[:end], 0].mean()))
    np.testing.assert_allclose(ours.score(PAIRS), expected, rtol=1e-4, atol=1e-4)
