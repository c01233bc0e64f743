"""LM-Cocktail's functions and `retune merge`: its printed examples, weights from data by hand and by other means."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tiny import tiny_bert, tiny_decoder, tiny_reranker
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForSequenceClassification, BertModel, LlamaForCausalLM

from retune import Reranker, mix_models, mix_models_by_layers, mix_models_with_data
from retune.cli import main
from retune.cocktail import weigh
from retune.data.examples import Completion, Group
from retune.runtime import UserError
from retune.stages.card import describe
from retune.training import appraisal
from retune.training.appraisal import Limits, shares

ROWS = [
    {"query": "bar cost", "pos": ["bar cost din"], "neg": ["fun gelt", "hip lox lom"]},
    {"query": "mux gen", "pos": ["mux gen band", "gen"], "neg": ["bar cost din"]},
    {"query": "hip hip", "pos": ["hip"], "neg": []},
]
SAID = [{"input": "Is it bar?\n", "output": "Yes"}, {"input": "Is it cost?\n", "output": "No, it is din"}]


EMBEDDERS = ["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora"]
SPEAKERS = ["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news", "Shitao/llama2-nq"]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with tiny models under the names of the published examples."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate([*EMBEDDERS, "Shitao/bge-msmarco"]):
        tiny_bert(tmp_path / name, seed)
    for seed, name in enumerate(SPEAKERS):
        tiny_decoder(tmp_path / name, "llama", seed)
    tiny_reranker(tmp_path / "BAAI/bge-reranker-base", 0)
    return tmp_path


# ---- as they are printed ------------------------------------------------------------------------

# LM-Cocktail's own examples, as our page shows them: three with mix_models, one with rows, one with texts to go on.
PAGE = (Path(__file__).parents[1] / "docs/commands.md").read_text(encoding="utf-8")
MIXED, BY_ROWS, BY_TEXTS = re.findall(r"```python\n(from retune import mix_models, .*?)```", PAGE, re.DOTALL)
OTHERS = """
from retune import mix_models, mix_models_with_data

model = mix_models(
    model_names_or_paths=["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora", "Shitao/bge-msmarco"],
    model_type='encoder',
    weights=[0.3, 0.2, 0.2, 0.3],
    output_path='./mixed_embedder_2')

from retune import mix_models_by_layers

model = mix_models_by_layers(
    model_names_or_paths=["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news"],
    model_type='decoder',
    weights=[0.7, 0.3],
    output_path='./mixed_llm')
"""


def test_the_example_of_mix_models(here):
    found: dict = {}
    exec(MIXED, found)
    assert isinstance(found["model"], BertForSequenceClassification)
    assert state(here / "mixed_reranker").keys() == found["model"].state_dict().keys()
    own = state(here / "BAAI/bge-reranker-base")
    assert all(torch.equal(tensor, own[name]) for name, tensor in state(here / "mixed_reranker").items())
    one, two = state(here / "BAAI/bge-base-en-v1.5"), state(here / "Shitao/bge-hotpotqa")
    mixed = state(here / "mixed_embedder")
    assert all(torch.equal(mixed[name], 0.5 * one[name] + 0.5 * two[name]) for name in one)
    assert SentenceTransformer("./mixed_embedder", device="cpu").encode("bar cost").shape == (32,)
    assert AutoTokenizer.from_pretrained("./mixed_llm")("bar")["input_ids"]
    assert isinstance(AutoModelForCausalLM.from_pretrained("./mixed_llm"), LlamaForCausalLM)


def test_the_other_examples_of_mix_models(here):
    found: dict = {}
    exec(OTHERS, found)
    states = [state(here / name) for name in [*EMBEDDERS, "Shitao/bge-msmarco"]]
    name = "encoder.layer.0.attention.self.query.weight"
    expected = sum(weight * one[name].double() for weight, one in zip([0.3, 0.2, 0.2, 0.3], states, strict=True))
    assert torch.equal(state(here / "mixed_embedder_2")[name], expected.float())
    name = "model.layers.0.mlp.up_proj.weight"
    one, two = (state(here / folder)[name].double() for folder in SPEAKERS[:2])
    assert torch.equal(found["model"].state_dict()[name], (0.7 * one + 0.3 * two).float())
    assert torch.equal(state(here / "mixed_llm")[name], found["model"].state_dict()[name])


@pytest.mark.parametrize(
    ("printed", "models", "kind", "limits", "made", "name"),
    [
        (BY_ROWS, EMBEDDERS, "encoder", {"max_input_length": 512, "neg_number": 2}, BertModel,
         "encoder.layer.1.output.dense.weight"),
        (BY_TEXTS, SPEAKERS, "decoder", {}, LlamaForCausalLM, "model.layers.1.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_the_examples_of_mix_models_with_data(here, capsys, printed, models, kind, limits, made, name):
    before = sorted(path.name for path in here.iterdir())
    found: dict = {}
    exec(printed, found)
    model = found["model"]
    assert isinstance(model, made) and sorted(path.name for path in here.iterdir()) == before
    shown = [float(line.split()[1].rstrip(":")) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 3 and sum(shown) == pytest.approx(1, abs=2e-4)
    weights = weigh(models, kind, list(enumerate(found["example_data"])), 5.0, **limits)
    assert shown == pytest.approx(weights, abs=1e-4)
    exact = sum(weight * state(here / one)[name].double() for one, weight in zip(models, weights, strict=True))
    assert torch.equal(model.state_dict()[name], exact.float())


def test_more_negatives_than_neg_number_do_not_count(here, capsys):
    few = [row | {"neg": row["neg"][:1]} for row in ROWS]
    mix_models_with_data(EMBEDDERS, "encoder", ROWS, temperature=0.1, neg_number=1)
    mix_models_with_data(EMBEDDERS, "encoder", few, temperature=0.1)
    mix_models_with_data(EMBEDDERS, "encoder", ROWS, temperature=0.1)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == shown[3:6] != shown[6:]


def test_by_layers_is_the_same_and_returns_the_model(here):
    models = ["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa"]
    mix_models(models, "encoder", [0.2, 0.8], "one")
    model = mix_models_by_layers(models, "encoder", [0.2, 0.8], "two")
    assert (here / "one/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()
    assert all(torch.equal(tensor, state(here / "two")[name]) for name, tensor in model.state_dict().items())


def test_an_encoder_that_does_not_say_how_it_pools_takes_the_first_token(here):
    for name in ("BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa"):
        (here / name / "modules.json").unlink()
    model = mix_models(["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa"], "encoder", [0.5, 0.5], "out")
    tokens = AutoTokenizer.from_pretrained("out")(["bar cost"], return_tensors="pt")
    with torch.no_grad():
        first = torch.nn.functional.normalize(model.eval()(**tokens).last_hidden_state[:, 0], dim=-1)
    found = SentenceTransformer("out", device="cpu").encode(["bar cost"])
    assert np.allclose(found, first.numpy(), atol=1e-6)


def test_importing_retune_imports_nothing():
    code = "import retune, sys; print([m for m in ('torch', 'numpy', 'retune.cocktail') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(ImportError, match="mix_model'"):
        exec("from retune import mix_model")


# ---- weights from losses ------------------------------------------------------------------------


def test_shares_by_hand():
    """Losses 1 and 3 at temperature 2: exp(-.5) and exp(-1.5), a ratio of e."""
    assert shares([1, 3], 2) == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert shares([0.7, 0.7, 0.7], 5) == pytest.approx([1 / 3] * 3)
    assert shares([1e5, 0], 1) == [0, 1]  # no overflow
    assert np.allclose(shares([0.2, 1.9, 4.0], 5), torch.softmax(-torch.tensor([0.2, 1.9, 4.0]) / 5, -1))


def test_embedder_loss_by_hand(monkeypatch):
    """Two queries and their passages at chosen places: scores (1, 0, .5, 0) and (0, 1, .5, 1) over .05."""
    vectors = {"a": [1, 0], "b": [0, 1], "a1": [1, 0], "a2": [0, 1], "b1": [0.5, 0.5], "b2": [0, 1]}
    monkeypatch.setattr(
        appraisal, "_vectors", lambda _, texts, *rest: torch.tensor([vectors[t] for t in texts]).double()
    )
    monkeypatch.setattr(appraisal.checkpoint, "resolve", lambda model, revision: model)
    monkeypatch.setattr(appraisal.parts, "locate", lambda settings: None)
    monkeypatch.setattr(appraisal, "pools", lambda settings, made_of: True)
    monkeypatch.setattr(appraisal.Embedder, "load", lambda *_: SimpleNamespace(max_lengths={}))
    groups = [Group("a", None, ["a1", "a2"], frozenset(["a1"])), Group("b", None, ["b1", "b2"], frozenset(["b1"]))]
    one = math.log(math.exp(20) + 1 + math.exp(10) + 1) - 20
    two = math.log(1 + math.exp(20) + math.exp(10) + math.exp(20)) - 10
    assert appraisal.embedder_loss("m", groups, Limits()) == pytest.approx((one + two) / 2, rel=1e-12)
    groups[1] = Group("b", None, ["b1", "b2"], frozenset(["b1", "a2"]))  # a2 is a positive of b: it counts for nothing
    two = math.log(1 + math.exp(10) + math.exp(20)) - 10
    assert appraisal.embedder_loss("m", groups, Limits()) == pytest.approx((one + two) / 2, rel=1e-12)


def test_embedder_loss_through_sentence_transformers(tmp_path):
    model = tiny_bert(tmp_path / "m", 3)
    theirs = SentenceTransformer(str(model), device="cpu")
    passages = [text for row in ROWS for text in (row["pos"][0], *row["neg"][:1])]
    queries = [row["query"] for row in ROWS]
    scores = torch.from_numpy(theirs.encode(queries).astype(float) @ theirs.encode(passages).astype(float).T) / 0.05
    # passages: 0 and 1 of the first row, 2 and 3 of the second, 4 of the third; 3 reads as the first row's positive
    scores[0, 3] = -torch.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2, 4]))
    for batch_size in (1, 2, 8):
        found = appraisal.losses([model], "encoder", list(enumerate(ROWS)), Limits(batch_size, 64, 1))
        assert found == pytest.approx([float(expected)], abs=1e-4)


def test_decoder_loss_by_another_way(tmp_path):
    model = tiny_decoder(tmp_path / "m", "llama", 1)
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    total = count = 0
    for row in SAID:  # token by token
        ids = [*tokenizer.encode(row["input"] + " " + row["output"]), tokenizer.eos_token_id]
        for place in range(len(tokenizer.encode(row["input"])), len(ids)):
            with torch.no_grad():
                logits = network(torch.tensor([ids[:place]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[ids[place]])
            count += 1
    for batch_size in (1, 2):
        found = appraisal.losses([model], "decoder", list(enumerate(SAID)), Limits(batch_size, 512))
        assert found == pytest.approx([total / count], abs=1e-4)
    whole = Completion(SAID[0]["input"], SAID[0]["output"])
    ids, start = appraisal._tokens(tokenizer, whole, 512)
    cut, _ = appraisal._tokens(tokenizer, whole, len(ids) - 1)
    assert cut == ids[:-1] and ids[-1] == tokenizer.eos_token_id and ids[:start] == tokenizer.encode(whole.input)
    with pytest.raises(UserError, match="of number 1 no token of the output is within"):
        appraisal.losses([model], "decoder", list(enumerate(SAID)), Limits(1, start))


def test_reranker_loss_through_crossencoder(tmp_path):
    model = tiny_reranker(tmp_path / "m", 4)
    theirs = CrossEncoder(str(model), device="cpu", activation_fn=torch.nn.Identity())
    losses = []
    for row in ROWS[:2]:
        texts = [row["pos"][0], *row["neg"]]
        logits = torch.from_numpy(theirs.predict([(row["query"], text) for text in texts])).double()
        losses.append(float(-logits.log_softmax(0)[0]))
    found = appraisal.losses([model], "reranker", list(enumerate(ROWS[:2])), Limits())
    assert found == pytest.approx([np.mean(losses)], abs=1e-5)
    with pytest.raises(UserError, match="a reranker needs negatives, and 1 of 3 have none"):
        appraisal.losses([model], "reranker", list(enumerate(ROWS)), Limits())


def test_the_better_model_gets_more_and_the_temperature_says_how_much(tmp_path):
    good, bad = tiny_decoder(tmp_path / "good", "llama", 1), tiny_decoder(tmp_path / "bad", "llama", 2)
    network = AutoModelForCausalLM.from_pretrained(good).train()
    tokenizer = AutoTokenizer.from_pretrained(good)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    texts = [[*tokenizer.encode(row["input"] + " " + row["output"]), tokenizer.eos_token_id] for row in SAID]
    for _ in range(15):
        for ids in texts:
            network(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(good)
    rows = list(enumerate(SAID))
    warm, cold = (weigh([good, bad], "decoder", rows, temperature) for temperature in (5.0, 0.5))
    assert cold[0] > warm[0] > 0.5 and sum(warm) == pytest.approx(1)
    assert weigh([good, bad], "decoder", rows, 5.0) == warm


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"expected at least one row {query, pos, neg}"),
        ([{"query": "bar", "pos": "cost"}], r"example_data\[0\]: pos: expected a list of strings, found a string"),
        ([ROWS[0], {"query": "", "pos": ["a"]}], r"example_data\[1\]: query: empty string"),
        ([ROWS[2]], "one passage alone tells nothing"),
    ],
)
def test_examples_that_are_none(here, rows, message):
    with pytest.raises(UserError, match=message):
        mix_models_with_data(["BAAI/bge-base-en-v1.5"] * 2, "encoder", rows)


def test_mistakes_before_anything_is_written(here):
    base = "BAAI/bge-base-en-v1.5"
    with pytest.raises(UserError, match="model_type: expected one of encoder, decoder, reranker; found 'embedder'"):
        mix_models([base], "embedder", [1], "out")
    with pytest.raises(UserError, match="is a BertModel, which is no decoder"):
        mix_models([base, base], "decoder", [0.5, 0.5], "out")
    with pytest.raises(UserError, match="expected one weight a model"):
        mix_models([base, base], "encoder", [1], "out")
    with pytest.raises(UserError, match="expected example_data"):
        mix_models_with_data([base, base], "encoder")
    with pytest.raises(UserError, match=r"example_data\[0\]: output: expected a string"):
        mix_models_with_data(["Shitao/llama2-nq"], "decoder", [{"input": "a"}], output_path="out")
    assert not (here / "out").exists()


def test_the_older_spelling_of_example_data(here):
    models = ["BAAI/bge-base-en-v1.5", "Shitao/bge-quora"]
    one = mix_models_with_data(models, "encoder", example_ata=ROWS, temperature=1.0).state_dict()
    two = mix_models_with_data(models, "encoder", ROWS, 1.0).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- the command --------------------------------------------------------------------------------


def test_the_command_with_weights(here):
    (here / "out").mkdir()
    (here / "out/notes.txt").write_text("mine")
    flags = ["--model_names_or_paths", "BAAI/bge-base-en-v1.5", "Shitao/bge-quora", "--output_path", "out"]
    assert main(["merge", *flags, "--model_type", "encoder", "--weights", ".25", ".75"]) == 0
    one, two, found = (state(here / name) for name in (*flags[1:3], "out"))
    assert all(torch.equal(found[n], (0.25 * one[n].double() + 0.75 * two[n].double()).float()) for n in one)
    card = (here / "out/README.md").read_text()
    assert "| 0.25 | `BAAI/bge-base-en-v1.5` |\n| 0.75 | `Shitao/bge-quora` |" in card and "## Data" not in card
    assert (here / "out/notes.txt").read_text() == "mine" and not list((here / "out").glob(".mixture*"))


CARDS = [
    ("reranker", ["BAAI/bge-reranker-base", "BAAI/other"], "AutoModelForSequenceClassification", "text-ranking"),
    ("reranker", SPEAKERS[:2], "AutoModelForCausalLM", "text-ranking"),
    ("decoder", SPEAKERS[:2], "AutoModelForCausalLM", "text-generation"),
]


@pytest.mark.parametrize(("kind", "models", "loader", "task"), CARDS)
def test_rerankers_and_language_models_get_a_card(here, monkeypatch, kind, models, loader, task):
    tiny_reranker(here / "BAAI/other", 1)
    flags = ["--model_names_or_paths", *models, "--output_path", "out", "--model_type", kind]
    monkeypatch.setattr("retune.stages.card._hub_id", lambda name: name)  # here they are folders
    assert main(["merge", *flags, "--weights", ".25", ".75"]) == 0
    card = ModelCard.load(here / "out/README.md")
    assert f"| 0.25 | `{models[0]}` |\n| 0.75 | `{models[1]}` |" in card.text
    assert f"transformers loads it with `{loader}.from_pretrained`" in card.text
    assert (card.data.pipeline_tag, card.data.base_model, card.data.base_model_relation) == (task, models, "merge")
    assert ("`CrossEncoder`" in card.text) == (loader == "AutoModelForSequenceClassification")
    found: dict = {}
    exec(card.text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(here / "out")), found)
    assert isinstance(found["model"], Reranker if kind == "reranker" else LlamaForCausalLM)


def test_a_card_tells_of_code_that_comes_with_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "their.Own"}}))
    describe(kind="decoder", loader="AutoModelForCausalLM", models=["./a"], weights=[1.0], folder=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)' in text
    assert "from_pretrained` and `trust_remote_code=True`." in text and "base_model" not in text


def test_the_command_with_examples_is_the_function(here):
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    models = ["Shitao/bge-hotpotqa", "Shitao/bge-quora"]
    flags = ["--model-names-or-paths", *models, "--model-type=encoder", "--output-path=out", "--temperature=0.5"]
    assert main(["merge", *flags, "--example_data", "rows.jsonl", "--neg_number", "1"]) == 0
    mix_models_with_data(models, "encoder", ROWS, 0.5, neg_number=1, output_path="api")
    assert (here / "out/model.safetensors").read_bytes() == (here / "api/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--weights, --example_data: expected one of them, found neither"),
        (["--weights", "1", "--example_data", "rows.jsonl"], "expected one of them, not both"),
        (["--weights", "1", "2"], "--weights: expected one weight a model, found 2 for 1"),
        (["--weights", "much"], "--weights: expected a number, found 'much'"),
        (["--weigths", "1"], "unknown flag --weigths; did you mean --weights?"),
        (["--example_data", "none.jsonl"], "none.jsonl: no such file"),
        (["--example_data", "rows.jsonl"], "rows.jsonl:1: pos: expected a list of strings, the column is missing"),
        (["--weights", "1", "--model_type", "bert"], "--model_type: expected one of encoder, decoder, reranker"),
        (["--weights", "1", "--temperature", "0", "--example_data"], "--example_data: expected one argument"),
    ],
)
def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text('{"query": "bar"}\n')
    given = ["--model_names_or_paths", "m", "--model_type", "encoder", "--output_path", "out", *flags]
    assert main(["merge", *given]) == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and not (tmp_path / "out").exists()
