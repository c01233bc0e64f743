"""The train stage: it learns, its checkpoint loads elsewhere, and an interruption leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flagembedding import ask, needs_flagembedding
from safetensors.torch import load_file
from tiny import tiny_bert
from toy import mrr, toy_tables

from retune import processes, tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data.batches import Chunker, joined
from retune.model.embedder import Embedder
from retune.objective.recipe import Recipe
from retune.runtime import UserError
from retune.stages import train as stage
from retune.stages.train import train
from retune.training.embedding import EmbedderTask
from retune.training.launch import launch
from retune.training.trainer import GroupTrainer

ARGS = {"learning_rate": 1e-3, "num_train_epochs": 4, "per_device_train_batch_size": 8, "save_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "base")


def job(folder: Path, base: Path, paths: dict[str, Path], args: dict | None = None, **settings) -> dict:
    """Arguments of `train`: 24 queries in batches of 8, so 3 steps an epoch."""
    settings = {"train_group_size": 3, "temperature": 0.05} | settings
    return {
        **paths, "bins": None, "settings": TrainConfig(args=ARGS | (args or {}), **settings),
        "embedder": EmbedderConfig(model=str(base)), "seed": 1, "drop_longer_than": None, "state": folder / "state",
        "model_out": folder / "model", "history_out": folder / "history.parquet",
    }  # fmt: skip


def history(folder: Path) -> list[dict]:
    """The logged steps without the speed, the one column that no seed decides."""
    return tables.read(folder / "history.parquet", "history").drop_columns("tokens_per_second").to_pylist()


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    train(**job(folder, base, toy_tables(folder / "tables")))
    return folder


def test_training_lowers_the_loss_and_lifts_mrr(trained, base):
    rows = history(trained)
    # every 10 steps, with every checkpoint, and at the end
    assert [row["step"] for row in rows] == [3, 6, 9, 10, 12]
    assert [row["epoch"] for row in rows] == pytest.approx([1, 2, 3, 10 / 3, 4])
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert all(row["grad_norm"] > 0 for row in rows) and rows[-1]["learning_rate"] < rows[1]["learning_rate"] <= 1e-3
    assert not (trained / "state").exists()
    before, after = (mrr(Embedder.load(str(model)), trained) for model in (base, trained / "model"))
    assert after > before + 0.1


def test_the_checkpoint_gives_the_same_vectors_in_sentence_transformers(trained, base):
    from sentence_transformers import SentenceTransformer

    texts = tables.read(trained / "tables" / "texts.parquet", "texts")["text"].to_pylist()
    ours = Embedder.load(str(trained / "model")).encode_passages(texts)
    theirs = SentenceTransformer(str(trained / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - Embedder.load(str(base)).encode_passages(texts)).max() > 0.01


THEIRS = """
import json, sys
import numpy as np
from FlagEmbedding import FlagModel
folder, out, texts = json.loads(sys.stdin.read())
model = FlagModel(
    folder, pooling_method="mean", query_instruction_for_retrieval="ba: ", query_instruction_format="{}{}",
    use_fp16=False, devices="cpu", query_max_length=64, passage_max_length=64,
)
np.savez(out, queries=model.encode_queries(texts), passages=model.encode_corpus(texts))
"""


@needs_flagembedding
def test_flagembedding_gives_the_same_vectors(trained, tmp_path):
    texts = tables.read(trained / "tables" / "texts.parquet", "texts")["text"].to_pylist()
    ask(THEIRS, str(trained / "model"), str(tmp_path / "out.npz"), texts)
    theirs = np.load(tmp_path / "out.npz")
    ours = Embedder.load(EmbedderConfig(model=str(trained / "model"), query_instruction="ba: "))
    np.testing.assert_allclose(ours.encode_queries(texts), theirs["queries"], atol=1e-4)
    np.testing.assert_allclose(ours.encode_passages(texts), theirs["passages"], atol=1e-4)


def test_the_same_seed_gives_the_same_bytes(trained, base, tmp_path):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    train(**job(tmp_path, base, paths))
    assert weights(tmp_path) == weights(trained)
    assert history(tmp_path) == history(trained)


def watched_steps(monkeypatch) -> list[int]:
    """Steps that a run takes from now on, as they are taken."""
    steps, plain = [], GroupTrainer.compute_loss

    def watched(self, *given, **named):
        steps.append(self.state.global_step)
        return plain(self, *given, **named)

    monkeypatch.setattr(GroupTrainer, "compute_loss", watched)
    return steps


# ---- interruption -------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path

from retune.stages.train import main
from retune.training.trainer import GroupTrainer

plain = GroupTrainer.compute_loss

def until_step_8(self, *args, **kwargs):
    if self.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args, **kwargs)

GroupTrainer.compute_loss = until_step_8
main(json.loads(Path(sys.argv[1]).read_text()))
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, base, tmp_path, monkeypatch):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    arguments = job(tmp_path, base, paths)
    written = {name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value and str(value)
               for name, value in arguments.items() if name != "seed"} | {"seed": arguments["seed"]}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(written))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "job.json")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "state" / "checkpoints" / "checkpoint-6" / "complete").exists()
    assert not (tmp_path / "model").exists() and not (tmp_path / "history.parquet").exists()
    steps = watched_steps(monkeypatch)
    train(**arguments)
    assert steps == [6, 7, 8, 9, 10, 11]
    assert weights(tmp_path) == weights(trained) and history(tmp_path) == history(trained)


@pytest.mark.parametrize(
    ("method", "step", "goes_on_with"), [("_save_rng_state", 6, list(range(3, 12))), ("save", 12, [])]
)
def test_a_half_written_end_is_not_used(trained, base, tmp_path, monkeypatch, method, step, goes_on_with):
    """Interrupted while a checkpoint is written, and after the last step while the model is."""
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    owner = GroupTrainer if method == "_save_rng_state" else Embedder
    plain = getattr(owner, method)

    def interrupted(self, folder):
        if owner is Embedder or self.state.global_step == step:
            raise KeyboardInterrupt
        plain(self, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted)
        train(**job(tmp_path, base, paths))
    assert not (tmp_path / "model").exists() and (tmp_path / "state").exists()
    steps = watched_steps(monkeypatch)
    train(**job(tmp_path, base, paths))
    assert steps == goes_on_with
    assert weights(tmp_path) == weights(trained) and history(tmp_path) == history(trained)


def test_checkpoints_of_another_run_are_not_used(trained, base, tmp_path, monkeypatch):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Embedder, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(**job(tmp_path, base, paths, {"learning_rate": 5e-3}))
    assert list((tmp_path / "state" / "checkpoints").glob("checkpoint-*"))
    train(**job(tmp_path, base, paths))
    assert weights(tmp_path) == weights(trained)


def test_an_older_result_is_replaced(trained, base, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    train(**job(tmp_path, base, toy_tables(tmp_path / "tables", 8), {"max_steps": 1}))
    assert not (tmp_path / "model" / "old.txt").exists() and (tmp_path / "model" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---- several processes --------------------------------------------------------------------------


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    paths = toy_tables(tmp_path / "tables", 26, score=np.linspace(-2, 2, 104).tolist())
    common = {"negatives_cross_device": True, "knowledge_distillation": True}
    args = {"learning_rate": 3e-4, "logging_steps": 1, "num_train_epochs": 2}
    train(**job(tmp_path / "two", base, paths, args | {"per_device_train_batch_size": 4}, nproc_per_node=2, **common))
    train(**job(tmp_path / "one", base, paths, args, **common))
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(one) == len(two) == 8  # 26 queries: three batches of 8 and one of 2
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=1e-3, err_msg=key)
    assert not (tmp_path / "two" / "state").exists()


def test_a_failing_process_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"train\.nproc_per_node: one of 1 processes failed"):
        launch("retune.no_such_module", {}, 1, tmp_path)


def test_a_process_hands_a_mistake_to_its_parent(tmp_path):
    """What `launch` raises is what a process wrote down; a real one would take ten seconds here."""

    def mistaken(job: dict) -> None:
        raise UserError(f"train.args: {job['word']}")

    (tmp_path / "job.json").write_text('{"word": "wrong"}')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"^train\.args: wrong$"):
        patch.setattr("retune.processes.start_logging", lambda: None)
        patch.setattr("subprocess.Popen", lambda *_, **__: None)
        patch.setattr("retune.training.launch._wait_for", lambda _: processes.run_job(mistaken, tmp_path / "job.json"))
        launch("any", {"word": "wrong"}, 2, tmp_path)


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rat": 1}, r"train\.args: .*learning_rat"),
        ({"lr_scheduler_type": "lin"}, r"train\.args: .*lin"),
        ({"eval_strategy": "steps"}, r"train\.args\.eval_strategy: there is no evaluation"),
        ({"fp16": True, "bf16": True}, r"train\.args: "),
        ({"learning_rate": 0.0}, "left every weight as it was"),
        ({"per_device_train_batch_size": 100, "dataloader_drop_last": True}, "do not fill one batch"),
    ],
)
def test_mistakes_in_the_arguments(base, tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        train(**job(tmp_path, base, toy_tables(tmp_path / "tables", 8), args))
    assert not (tmp_path / "model").exists()


def test_harmless_arguments_are_accepted(base, tmp_path, monkeypatch):
    args = {"eval_strategy": "no", "warmup_ratio": 0.5, "max_steps": 2, "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True,
            "save_strategy": "epoch", "activation_checkpointing": True}  # fmt: skip
    loaders = []
    monkeypatch.setattr(GroupTrainer, "get_train_dataloader", lambda self: loaders.append(self.batches) or self.batches)
    train(**job(tmp_path, base, toy_tables(tmp_path / "tables"), args))
    assert [row["step"] for row in history(tmp_path)] == [2]
    assert [(one.num_workers, one.prefetch_factor, one.persistent_workers) for one in loaders] == [(1, 1, True)]


def test_noise_on_the_embeddings_is_the_same_in_chunks(tmp_path):
    """`neftune_noise_alpha` changes what is learnt; activations that are computed again meet the same noise."""
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    paths, learnt = toy_tables(tmp_path / "tables"), {}
    for name, noise, kept in (("plain", None, False), ("noisy", 5.0, False), ("cached", 5.0, True)):
        args = {"max_steps": 2, "neftune_noise_alpha": noise}
        train(**job(tmp_path / name, base, paths, args, grad_cache=kept, max_tokens_per_batch=128))
        learnt[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    apart = max((learnt["noisy"][name] - weight).abs().max().item() for name, weight in learnt["plain"].items())
    assert apart > 1e-5
    for name, weight in learnt["noisy"].items():
        torch.testing.assert_close(learnt["cached"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_names_the_queries(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "__call__", lambda self, queries, *_: queries.sum() * float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1; queries of the batch: toy\.jsonl:\d+, "):
        train(**job(tmp_path, base, toy_tables(tmp_path / "tables")))


@pytest.mark.parametrize(
    ("settings", "args", "changed", "message"),
    [
        ({"use_inbatch_neg": False}, {}, {}, "nothing but its positive"),
        ({}, {"per_device_train_batch_size": 1}, {}, "nothing but its positive"),
        (
            {"same_dataset_within_batch": True},
            {},
            {"dataset": ["a"] * 4 + ["b"] * 4, "batch_size": [None] * 4 + [1] * 4},
            r"ingest\.train: the batch_size 1 of b leaves its queries nothing but their positives",
        ),
        ({}, {}, {"in_batch_negatives": [True] * 3 + [False] * 5}, r"toy\.jsonl:4: in_batch_negatives"),
    ],
)
def test_one_candidate_a_query_is_refused(base, tmp_path, settings, args, changed, message):
    paths = toy_tables(tmp_path / "tables", 8, **changed)
    with pytest.raises(UserError, match=message):
        train(**job(tmp_path, base, paths, args, train_group_size=1, **settings))


def test_no_query_left_names_the_threshold(base, tmp_path):
    paths = toy_tables(tmp_path / "tables", 8)
    homogeneous = {"same_dataset_within_batch": True, "small_threshold": 10, "drop_threshold": 9}
    with pytest.raises(UserError, match=r"^train\.drop_threshold: 9 leaves none of the 8 training queries"):
        train(**job(tmp_path, base, paths, **homogeneous))


def test_pairs_alone_train_with_in_batch_negatives(base, tmp_path):
    paths = toy_tables(tmp_path / "tables", n_negatives=0)
    train(**job(tmp_path, base, paths, train_group_size=1))
    rows = history(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(("loss", "sign"), [("kl_div", -1), ("margin_mse", -1), ("m3_kd_loss", 1)])
def test_distillation_follows_the_teacher(tmp_path, loss, sign):
    """A teacher that turns positives and negatives round: the tuned model agrees with it, not with the labels.

    m3_kd_loss never has a negative compete with the positive before it, so there the teacher agrees with the labels.
    """
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    scores = [sign * 5.0, sign * -5.0, sign * -5.0, sign * -5.0] * 24
    paths = toy_tables(tmp_path / "tables", score=scores)
    settings = {"knowledge_distillation": True, "use_inbatch_neg": False, "train_group_size": 4, "temperature": 0.2}
    settings |= {"kd_loss_type": loss, "info_nce_weight": 0}  # the distillation alone
    train(**job(tmp_path, base, paths, {"num_train_epochs": 20}, **settings))
    pairs = tables.read(paths["pairs"], "pairs")
    model = Embedder.load(str(tmp_path / "model"))
    queries = model.encode_queries(tables.read(paths["queries"], "queries")["text"].to_pylist())
    texts = model.encode_passages(tables.read(paths["texts"], "texts")["text"].to_pylist())
    similar = (queries[pairs["query_id"].to_numpy()] * texts[pairs["text_id"].to_numpy()]).sum(1).reshape(-1, 4)
    assert (sign * similar[:, :1] > sign * similar[:, 1:]).mean() > 0.9


def test_matryoshka_puts_more_into_the_first_dimensions(tmp_path):
    """Trained on 4 dimensions too, 4 dimensions tell texts apart better than where only 32 were trained on."""
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    paths = toy_tables(tmp_path / "tables")
    right = {}
    for name, settings in {"all": {}, "first": {"use_mrl": True, "mrl_dims": [32, 4]}}.items():
        train(**job(tmp_path / name, base, paths, {"num_train_epochs": 20}, **settings))
        model = Embedder.load(EmbedderConfig(model=str(tmp_path / name / "model")))
        queries = model.encode_queries(tables.read(paths["queries"], "queries")["text"].to_pylist())[:, :4]
        texts = model.encode_passages(tables.read(paths["texts"], "texts")["text"].to_pylist())[:, :4]
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        right[name] = ((queries @ texts.T).argmax(1) == np.arange(24)).mean()
    assert right["first"] > right["all"] + 0.1


def test_more_dimensions_than_the_model_has(base, tmp_path, caplog):
    paths = toy_tables(tmp_path / "tables", 8)
    with pytest.raises(UserError, match=r"train\.mrl_dims: 64 is more than the model's 32 dimensions"):
        train(**job(tmp_path, base, paths, use_mrl=True, mrl_dims=[64, 8]))
    with caplog.at_level("WARNING", "retune"):
        train(**job(tmp_path, base, paths, {"max_steps": 1}, use_mrl=True, mrl_dims=[8]))
    assert any("without 32, whole vectors are not trained on" in record.getMessage() for record in caplog.records)


def test_every_option_at_once_learns(base, tmp_path):
    types = ["only_1neg", "symmetric_class", "symmetric_sts", None] * 6
    scores = [2.0, 1.0, 0.0, -1.0] * 24
    paths = toy_tables(tmp_path / "tables", type=types, score=scores, in_batch_negatives=[True] * 20 + [False] * 4)
    settings = {
        "train_group_size": 6, "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss", "info_nce_weight": 0.5,
        "directions": ["query_to_passage", "passage_to_query"], "mask_false_negatives": "margin", "use_mrl": True,
        "mrl_dims": [32, 8],
    }  # fmt: skip
    train(**job(tmp_path, base, paths, **settings))
    rows = history(tmp_path)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert rows[-1]["positive_similarity"] - rows[-1]["negative_similarity"] > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_mrl": True}, "use_mrl: expected mrl_dims"),
        ({"mrl_dims": [8]}, "mrl_dims: they count only with `use_mrl: true`"),
        ({"use_mrl": True, "mrl_dims": [8, 8]}, "mrl_dims: one is named twice"),
        ({"directions": []}, "directions"),
        ({"directions": ["passage_to_query"], "use_inbatch_neg": False}, "needs other queries"),
        (
            {"directions": ["passage_to_query"], "knowledge_distillation": True, "kd_loss_type": "margin_mse"},
            "margin_mse comes without InfoNCE",
        ),
        ({"knowledge_distillation": True, "train_group_size": 1}, "train_group_size must exceed 1"),
        ({"mask_false_negatives": "vectors"}, "mask_false_negatives"),
    ],
)
def test_settings_without_a_whole_objective(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_the_recipe_is_that_of_the_settings():
    model = SimpleNamespace(dim=32, card=SimpleNamespace(normalize=False))
    assert stage._recipe(TrainConfig(), model) == Recipe("batch", 0.02, None, True, normalize=False)
    settings = {
        "temperature": 0.1, "negatives_cross_device": True, "mask_false_negatives": "margin",
        "false_negative_margin": 0.2, "directions": ["passage_to_query"], "use_mrl": True, "mrl_dims": [32, 8],
        "knowledge_distillation": True, "kd_loss_type": "margin_mse", "info_nce_weight": 2,
    }  # fmt: skip
    wanted = Recipe("world", 0.1, "margin_mse", True, 0.2, ("passage_to_query",), (32, 8), False, 2)
    assert stage._recipe(TrainConfig(**settings), model) == wanted
    settings = TrainConfig(use_inbatch_neg=False, mask_false_negatives=None, false_negative_margin=0.2)
    assert stage._recipe(settings, model) == Recipe("group", 0.02, None, False, normalize=False)


# ---- equality with the plain form ---------------------------------------------------------------


def test_chunks_give_the_gradient_of_one_padded_batch(tmp_path):
    model = Embedder.load(str(tiny_bert(tmp_path, dropout=0.0)), torch.float32, torch.device("cpu"))
    data = toy_tables(tmp_path / "tables", 6)
    queries = tables.read(data["queries"], "queries")["text"].to_pylist()
    texts = tables.read(data["texts"], "texts")["text"].to_pylist()
    tokens = joined([model.tokenize(queries, "query"), model.tokenize(texts, "passage")])
    passages = np.array([0, 6, 7, 1, 6, 8, 2, 9, 6, 3, 10, 11, 4, 7, 6, 5, 9, 8])  # some occur several times
    rows = np.concatenate([np.arange(6), 6 + passages])
    others = {
        "passage_ids": torch.from_numpy(passages), "positive_rows": torch.arange(6), "positive_ids": torch.arange(6),
        "in_batch": torch.ones(6, dtype=torch.bool),
    }  # fmt: skip
    task = EmbedderTask(model, Recipe("batch", 0.1))
    batch, places = Chunker(tokens, model.pad_token_id, 60, 1, 1)(rows)
    assert len(batch["chunks"]) > 3
    places = torch.from_numpy(places)
    loss = task(batch["chunks"], places[:6], places[6:], **others)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in task.named_parameters() if weight.grad is not None}

    task.zero_grad()
    encoded = model.tokenizer.hf([[*queries, *texts][row] for row in rows], padding=True, return_tensors="pt")
    plain = task(
        [{k: encoded[k] for k in ("input_ids", "attention_mask")}], torch.arange(6), torch.arange(6, 24), **others
    )
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, weight in task.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_the_parent_of_several_processes_imports_no_torch():
    code = "import sys; import retune.stages.train; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
    assert stage.__doc__
