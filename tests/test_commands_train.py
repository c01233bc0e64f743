"""retune train: the stage's own training from plain rows and flags, resumable, in one process or several."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, tiny_bert, tiny_decoder

import retune
from retune import tables
from retune.cli import main
from retune.commands import arguments, placing, train
from retune.commands.flags import Given, parse
from retune.commands.work import Work
from retune.config import EmbedderConfig, IngestConfig, TrainConfig
from retune.model.embedder import Embedder
from retune.runtime import UserError
from retune.stages import train as stage
from retune.stages.ingest import ingest
from retune.training.trainer import GroupTrainer

FAST = ("--learning_rate", "1e-3", "--num_train_epochs", "2", "--per_device_train_batch_size", "8",
        "--train_group_size", "3", "--temperature", "0.05", "--passage_max_len", "64")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command puts into the environment goes with the test."""
    for name in ("TENSORBOARD_LOGGING_DIR", "HF_TOKEN", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def some_rows(n: int = 24, seed: int = 0) -> list[dict]:
    """`n` rows whose query is the beginning of the positive, with three negatives and a teacher's scores."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 24))) for _ in range(4 * n)]
    return [
        {"query": " ".join(texts[i].split()[:3]), "pos": [texts[i]], "neg": texts[n + 3 * i :][:3],
         "pos_scores": [2.0], "neg_scores": [1.0, 0.5, -1.0]}
        for i in range(n)
    ]  # fmt: skip


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Folder:
    """A folder with rows in rows.jsonl, and `retune train` from there to out."""

    def __init__(self, folder: Path, base: str) -> None:
        self.path, self.base, self.rows, self.out = folder, base, folder / "rows.jsonl", folder / "out"
        write(self.rows, some_rows())

    def words(self, *flags: object) -> list[str]:
        files = ["--train_data", self.rows, "--output_dir", self.out, "--model_name_or_path", self.base]
        return ["train", *map(str, [*files, *FAST, *flags])]

    def said(self, *flags: object, code: int = 0) -> str:
        """What a run, which ends with `code`, writes to standard error."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(self.words(*flags)) == code, said.getvalue()
        assert "Traceback" not in said.getvalue()
        return said.getvalue()

    def weights(self) -> bytes:
        return (self.out / "model.safetensors").read_bytes()

    def history(self) -> list[dict]:
        table = tables.read(self.out / "history.parquet", "history")
        return table.drop_columns("tokens_per_second").to_pylist()


@pytest.fixture
def folder(tmp_path: Path, base: str) -> Folder:
    return Folder(tmp_path, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: str) -> Folder:
    """A run without interruption."""
    folder = Folder(tmp_path_factory.mktemp("trained"), base)
    folder.said()
    return folder


def training(*argv: str) -> Given:
    files = ["--train_data", "a", "--output_dir", "b", "--model_name_or_path", "m"]
    return parse("train", train.FLAGS, "", [*files, *argv], train.further_flags)


# ---- the model ----------------------------------------------------------------------------------


def test_it_is_the_stages_training(trained: Folder, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected")}
    ingest(IngestConfig(train=str(trained.rows)), paths, seed=0)
    del paths["rejected"]
    args = {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    stage.train(
        **paths, bins=None, settings=TrainConfig(train_group_size=3, temperature=0.05, args=args), seed=42,
        embedder=EmbedderConfig(model=trained.base, query_max_length=32, passage_max_length=64, normalize=True),
        drop_longer_than=None, state=tmp_path / "state", model_out=tmp_path / "model", history_out=tmp_path / "history",
    )  # fmt: skip
    assert trained.weights() == (tmp_path / "model" / "model.safetensors").read_bytes()
    steps = [row["step"] for row in trained.history()]
    assert steps[-1] == 6 and trained.history()[-1]["loss"] > 0


def test_it_loads_elsewhere_with_the_same_vectors(trained: Folder) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    texts = [row["pos"][0] for row in some_rows()[:4]]
    ours = Embedder.load(str(trained.out)).encode_passages(texts)
    np.testing.assert_allclose(SentenceTransformer(str(trained.out), device="cpu").encode(texts), ours, atol=1e-4)
    model, tokenizer = AutoModel.from_pretrained(trained.out), AutoTokenizer.from_pretrained(trained.out)
    inputs = tokenizer(texts[:1], return_tensors="pt", truncation=True, max_length=64)
    plain = model(**inputs).last_hidden_state[0].mean(0).detach().numpy()
    np.testing.assert_allclose(plain / np.linalg.norm(plain), ours[0], atol=1e-4)
    assert np.abs(ours - Embedder.load(trained.base).encode_passages(texts)).max() > 0.01


def test_nothing_but_the_model_is_left(trained: Folder) -> None:
    names = {path.name for path in trained.out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "modules.json",
        "history.parquet",
        "README.md",
    } <= names
    assert not [name for name in names if name.startswith(".")] and (trained.out / "2_Normalize").is_dir()
    assert {path.name for path in trained.path.iterdir()} == {"rows.jsonl", "out"}
    card = (trained.out / "README.md").read_text()
    assert f"fine-tuned from `{trained.base}`" in card and "## Data" in card and "num_train_epochs" in card


def test_a_checkpoint_that_does_not_say_how_it_pools_is_pooled_by_its_first_token(folder: Folder) -> None:
    folder.base = str(tiny_bert(folder.path / "plain"))
    Path(folder.base, "modules.json").unlink()
    assert "does not say how it pools: cls, see --sentence_pooling_method" in folder.said("--max_steps", 1)
    assert Embedder.load(str(folder.out)).card.pooling == "cls"


def test_a_teachers_scores_are_learnt_from(trained: Folder, folder: Folder) -> None:
    folder.said("--knowledge_distillation", "True", "--kd_loss_type", "m3_kd_loss")
    assert folder.weights() != trained.weights()
    rows = some_rows()
    del rows[3]["pos_scores"], rows[3]["neg_scores"]
    write(folder.rows, rows)
    flags = "--knowledge_distillation", "--overwrite_output_dir"
    said = folder.said(*flags, code=1)
    assert "pairs have no teacher score, the first for query " + f"{folder.rows}:4" in said
    rows[3]["pos_scores"] = ["?"]  # of no matter without distillation
    write(folder.rows, rows)
    folder.said("--max_steps", 1, "--overwrite_output_dir")


# ---- rows ---------------------------------------------------------------------------------------


def test_each_file_is_a_dataset(folder: Folder, base: str) -> None:
    write(folder.path / "data/sts-no_in_batch_neg/one.jsonl", some_rows(6, 1))
    write(folder.path / "data/two.jsonl", [row | {"prompt": "co di"} for row in some_rows(9, 2)])
    cache = folder.path / "cache"
    flags = "--train_data", folder.rows, folder.path / "data", "--cache_path", cache, "--max_steps", 1
    folder.said(*flags, "--max_example_num_per_dataset", 8)
    [found] = cache.glob("*/ingest/queries.parquet")
    queries = tables.read(found, "queries")
    assert queries["dataset"].to_pylist() == ["rows"] * 8 + ["one"] * 6 + ["two"] * 8
    assert queries["in_batch_negatives"].to_pylist() == [True] * 8 + [False] * 6 + [True] * 8
    assert queries["prompt"].to_pylist() == [None] * 14 + ["co di"] * 8
    again = "--output_dir", folder.path / "again", "--max_example_num_per_dataset", 8, "--use_row_prompts"
    assert "ingest: done before" in folder.said(*flags, *again)
    folder.said(*flags, *again, "False", "--overwrite_output_dir")
    prompts = [tables.read(one, "queries")["prompt"].null_count for one in cache.glob("*/ingest/queries.parquet")]
    assert sorted(prompts) == [14, 22]


def test_queries_are_set_aside(folder: Folder) -> None:
    write(folder.path / "more.jsonl", some_rows(16, 3))
    flags = ["--train_data", folder.rows, folder.path / "more.jsonl", "--same_dataset_within_batch", "--dev_fraction"]
    said = folder.said(*flags, 0.25, "--early_stopping_patience", 3, "--shuffle_ratio", 0.5)
    assert "dev set: 10 queries" in said and "batches of one dataset each: 2 kinds" in said
    assert any(row["dev"] is not None for row in folder.history())
    said = folder.said(*flags, 0, "--early_stopping_patience", 3, "--overwrite_output_dir", code=1)
    assert "early_stopping_patience: no queries are set aside" in said


def test_bad_rows_are_named(folder: Folder) -> None:
    write(folder.rows, [*some_rows(9), {"query": "q", "pos": "a"}])
    said = folder.said(code=1)
    assert f"{folder.rows}:10: pos: expected a list of strings, found a string" in said
    assert not (folder.out / "config.json").exists()
    folder.said("--on_bad_row", "skip", "--max_steps", 1)
    [listed] = [json.loads(line) for line in (folder.out / "rejected.jsonl").read_text().splitlines()]
    assert listed["source"] == f"{folder.rows}:10"


def test_the_models_own_files_are_no_rows(folder: Folder) -> None:
    """--output_dir may lie within --train_data."""
    folder.said("--train_data", folder.path, "--max_steps", 1)
    folder.said("--train_data", folder.path, "--max_steps", 1, "--overwrite_output_dir")
    said = folder.said("--train_data", folder.out, "--overwrite_output_dir", code=1)
    assert "--train_data: nothing but the files of --output_dir" in said


# ---- an earlier model ---------------------------------------------------------------------------


def test_a_model_is_replaced_on_demand_only(folder: Folder) -> None:
    folder.said("--max_steps", 1)
    before = folder.weights()
    assert "holds a model; --overwrite_output_dir replaces it" in folder.said(code=1)
    (folder.out / "notes.txt").write_text("mine")
    (folder.out / "model-00001-of-00002.safetensors").write_text("of an earlier model")
    folder.said("--overwrite_output_dir")
    assert folder.weights() != before and (folder.out / "notes.txt").read_text() == "mine"
    assert len(list(folder.out.glob("*.safetensors"))) == 1
    Embedder.load(str(folder.out))


def test_a_run_that_fails_leaves_the_earlier_model(folder: Folder) -> None:
    folder.said("--max_steps", 1)
    before = folder.weights()
    said = folder.said("--overwrite_output_dir", "--learning_rate", 0, code=1)
    assert "training left every weight as it was" in said and folder.weights() == before
    Embedder.load(str(folder.out))


# ---- interrupted --------------------------------------------------------------------------------


def watched_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that a run takes from now on, as they are taken."""
    steps, plain = [], GroupTrainer.compute_loss

    def watched(self, *given, **named):
        steps.append(self.state.global_step)
        return plain(self, *given, **named)

    monkeypatch.setattr(GroupTrainer, "compute_loss", watched)
    return steps


KILLED = """
import os, signal, sys
from retune.cli import main
from retune.training.trainer import GroupTrainer
plain = GroupTrainer.compute_loss
def until_step_5(self, *given, **named):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given, **named)
GroupTrainer.compute_loss = until_step_5
main(sys.argv[1:])
"""
AT_HOME = {"PYTHONPATH": str(Path(retune.__file__).parents[1])}


def test_a_killed_run_goes_on(trained: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, *folder.words("--save_steps", "3")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | AT_HOME)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.out.iterdir()] == [".state"]
    steps = watched_steps(monkeypatch)
    said = folder.said("--save_steps", "3")
    assert steps == [3, 4, 5] and "ingest: done before" in said and "going on from step 3 of 6" in said
    assert folder.weights() == trained.weights() and not (folder.out / ".state").exists()


@pytest.mark.parametrize("moves", [0, 3, 7])
def test_interrupted_while_the_model_is_placed(
    trained: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    folder.said("--max_steps", 1)
    steps, left, plain = watched_steps(monkeypatch), [None] * moves, placing._move

    def until(path: Path, target: Path) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(placing, "_move", until)
        folder.said("--overwrite_output_dir", code=130)
    assert len(steps) == 6 and not (folder.out / "config.json").exists()
    folder.said("--overwrite_output_dir")
    assert len(steps) == 6, "nothing is trained again"
    assert folder.weights() == trained.weights() and folder.history() == trained.history()
    names = {path.relative_to(trained.out) for path in trained.out.rglob("*")}
    assert {path.relative_to(folder.out) for path in folder.out.rglob("*")} == names


def test_files_are_moved_between_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "made/config.json", [1])
    write(tmp_path / "made/1_Pooling/config.json", [2])
    replace = os.replace

    def on_one_disk(source: Path, target: Path) -> None:
        if tmp_path / "made" in Path(source).parents:
            raise OSError(placing.errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_one_disk)
    placing.place(tmp_path / "made", tmp_path / "none", tmp_path / "out")
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.json")}
    assert found == {"out/config.json": "1\n", "out/1_Pooling/config.json": "2\n"}


# ---- adapters -----------------------------------------------------------------------------------


def test_adapters_by_flags(folder: Folder, base: str) -> None:
    """Saved beside the model, alone, trained further; a later model has no earlier one's adapters beside it."""
    lora = "--use_lora", "True", "--lora_rank", 4, "--target_modules", "query", "value", "--max_steps", 2
    folder.said(*lora)
    adapters = folder.out / "adapter"
    assert json.loads((adapters / "adapter_config.json").read_text())["r"] == 4
    texts = [row["pos"][0] for row in some_rows()[:4]]
    settings = {"model": base, "peft_path": str(adapters), "normalize": True}
    tuned = Embedder.load(str(folder.out)).encode_passages(texts)
    np.testing.assert_allclose(Embedder.load(EmbedderConfig(**settings)).encode_passages(texts), tuned, atol=1e-5)
    rows, other = folder.out, folder.path / "alone"
    folder.out = other
    further = "--from_peft", adapters, "--max_steps", 1, "--learning_rate", 1e-6
    folder.said(*further, "--save_merged_lora_model", "False")
    assert [path.name for path in other.glob("*.safetensors")] == ["adapter_model.safetensors"]
    np.testing.assert_allclose(Embedder.load(str(other)).encode_passages(texts), tuned, atol=1e-3)
    assert "holds a model; --overwrite_output_dir replaces it" in folder.said(*further, code=1)
    folder.out = rows
    folder.said("--raw_peft", other, "--max_steps", 1, "--overwrite_output_dir")
    assert not (adapters / "adapter_config.json").exists() and (rows / "config.json").exists()


def test_the_incumbents_flags_of_adapters() -> None:
    given = training(
        "--use_lora", "True", "--target_modules", "q_proj", "k_proj", "--additional_special_tokens", "<a>", "<b>",
        "--modules_to_save", "embed_tokens", "--save_merged_lora_model", "True", "--peft_model_path", "",
        "--from_peft", "", "--config_name", "c", "--tokenizer_name", "t", "--fix_position_embedding", "--lora_dropout",
        "0.2", "--pad_to_multiple_of", "8",
    )  # fmt: skip
    settings, model = given.section("train", TrainConfig), given.section("embedder", EmbedderConfig)
    assert (settings.lora_rank, settings.lora_alpha, settings.lora_dropout) == (64, 16, 0.2)  # FlagEmbedding's defaults
    assert settings.target_modules == ["q_proj", "k_proj"] and settings.additional_special_tokens == ["<a>", "<b>"]
    assert settings.fix_position_embedding and settings.pad_to_multiple_of == 8 and not settings.continue_adapters
    assert (model.peft_path, model.config_name, model.tokenizer_name) == (None, "c", "t")


# ---- several processes --------------------------------------------------------------------------


def torchrun(folder: Folder, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "retune"]
    words = folder.words("--per_device_train_batch_size", "4", "--max_steps", "2", *flags)
    environment = os.environ | AT_HOME | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=300)


def test_torchrun(folder: Folder, tmp_path: Path) -> None:
    done = torchrun(folder, "--negatives_cross_device")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("24 queries (0 of them dev)") == 1, "one process reads the rows"
    assert done.stderr.count("history.parquet beside it") == 1
    assert folder.history()[-1]["step"] == 2 and not (folder.out / ".state").exists()
    # cross-device negatives in two processes are one big batch: the same as one process with twice the queries
    other = Folder(tmp_path / "other", folder.base)
    other.base = folder.base
    flags = "--max_steps", 2, "--dropout", 0
    other.said(*flags)
    folder.out = tmp_path / "again"
    done = torchrun(folder, "--negatives_cross_device", "--dropout", "0")
    assert done.returncode == 0, done.stderr
    texts = [row["pos"][0] for row in some_rows()]
    vectors = [Embedder.load(str(one.out)).encode_passages(texts) for one in (folder, other)]
    np.testing.assert_allclose(*vectors, atol=1e-4)
    assert np.abs(vectors[0] - Embedder.load(folder.base).encode_passages(texts)).max() > 1e-3


def test_the_others_wait_for_the_one_that_leads(tmp_path: Path) -> None:
    made, of = tmp_path / "made", {"seed": 1}
    leader, seen = Work(tmp_path / "work", True), []

    def follow() -> None:
        other = Work(tmp_path / "work", True, leads=False)
        other.step("ingest", "ingest", [made], of, lambda: seen.append("done twice"))
        seen.append(made.read_text())

    thread = threading.Thread(target=follow)
    thread.start()
    leader.step("ingest", "ingest", [made], {"seed": 2}, lambda: made.write_text("of other settings"))
    time.sleep(0.5)
    assert not seen
    leader.step("ingest", "ingest", [made], of, lambda: made.write_text("whole"))
    thread.join(20)
    assert seen == ["whole"]


# ---- flags --------------------------------------------------------------------------------------

# As FlagEmbedding's examples have it, without what needs a GPU or is not here yet.
EXAMPLE = """
    --cache_dir ./cache/model --cache_path ./cache/data --train_group_size 8 --query_max_len 512 --passage_max_len 512
    --query_instruction_for_retrieval Represent:  --query_instruction_format {}{} --knowledge_distillation False
    --overwrite_output_dir --learning_rate 1e-5 --fp16 --num_train_epochs 2 --per_device_train_batch_size 2
    --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing --logging_steps 1 --save_steps 1000
    --negatives_cross_device --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True
    --kd_loss_type kl_div --same_dataset_within_batch False --small_threshold 0 --drop_threshold 0 --shuffle_ratio 0.0
    --unified_finetuning False --self_distill_start_step -1 --fix_position_embedding False --sub_batch_size -1
    --use_fast_tokenizer True
"""


def test_the_incumbents_example() -> None:
    given = training(*EXAMPLE.split())
    settings = given.section("train", TrainConfig, args=arguments.arguments(given))
    assert settings.negatives_cross_device and settings.sub_batch_size is None and settings.train_group_size == 8
    assert settings.args == {
        "learning_rate": 1e-5, "num_train_epochs": 2, "per_device_train_batch_size": 2, "dataloader_drop_last": True,
        "warmup_ratio": 0.1, "gradient_checkpointing": True, "logging_steps": 1, "save_steps": 1000,
    } | ({"fp16": True} if arguments._is_there("fp16") else {})  # fmt: skip
    found = given.section("embedder", EmbedderConfig)
    assert (found.query_max_length, found.passage_max_length, found.pooling) == (512, 512, "cls")
    train._check(given, Path("nowhere"))


def test_defaults_are_the_incumbents() -> None:
    given = training()
    found, settings = given.section("embedder", EmbedderConfig), given.section("train", TrainConfig)
    assert (found.query_max_length, found.passage_max_length, found.normalize, found.pooling) == (32, 128, True, None)
    assert (settings.train_group_size, settings.temperature, settings.knowledge_distillation) == (8, 0.02, False)
    assert given["seed"] == 42 and arguments.arguments(given) == {}


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], {"use_lora": True}), (["--family", "icl"], {"use_lora": True}), (["--family", "encoder"], {}),
        (["--use_lora", "False"], {}), (["--no_use_lora"], {}),
        (["--from_peft", "a"], {"use_lora": True, "continue_adapters": True}),
    ],
)  # fmt: skip
def test_decoders_are_trained_by_adapters_as_the_incumbents_are(tmp_path: Path, caplog, argv, wanted) -> None:
    """FlagEmbedding's decoder_only.base and .icl have use_lora on; the family is the checkpoint's where not given."""
    given = training(*argv)
    model = EmbedderConfig(model=str(tiny_decoder(tmp_path, "llama")), family=given["family"])
    with caplog.at_level("INFO", "retune"):
        assert train._adapters(given, model) == wanted
    assert ("--use_lora False trains all weights" in caplog.text) == (wanted == {"use_lora": True})
    assert given.section("train", TrainConfig, **wanted).use_lora == bool(wanted)


def test_encoders_are_trained_whole(base: str) -> None:
    assert train._adapters(training(), EmbedderConfig(model=base)) == {}


@pytest.mark.parametrize("name", ["--normlized", "--normalized", "--normalize_embeddings"])
def test_old_and_new_names_are_one_flag(name: str) -> None:
    assert training(name, "False").section("embedder", EmbedderConfig).normalize is False


def test_usual_arguments_show_the_defaults_that_hold(tmp_path: Path) -> None:
    """Each shown default, given to training, is what training takes without it."""
    from retune.training.arguments import training_arguments

    left_to_the_machine = {"fp16", "bf16", "data_seed"}
    shown = {flag.name: flag.shown for flag in arguments.USUAL if flag.shown and flag.name not in left_to_the_machine}
    words = [word for name, value in shown.items() for word in (f"--{name}", value)]
    given = arguments.arguments(training(*words))
    assert set(given) == set(shown) and len(shown) > 12
    asked, plain = (training_arguments(args, tmp_path, 0).to_dict() for args in (given, {}))
    assert plain["gradient_checkpointing"] in (None, False)
    assert asked | {"gradient_checkpointing": None} == plain | {"gradient_checkpointing": None}


def test_every_training_argument_is_a_flag() -> None:
    from transformers import TrainingArguments

    names = {name for flag in [*train.FLAGS, *train.further_flags()] for name in flag.names}
    assert {field.name for field in fields(TrainingArguments)} - names == {"parallelism_config"}
    given = training(
        "--adam_beta2", "0.98", "--optim", "adamw_torch", "--dataloader_pin_memory", "False",
        "--no_skip_memory_metrics",
        "--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--report_to", "wandb", "tensorboard",
        "--local-rank=1", "--eval_steps", "0.5", "--liger_kernel_config", '{"rope": true}', "--hub_token", "t",
    )  # fmt: skip
    assert arguments.arguments(given) == {
        "adam_beta2": 0.98, "optim": "adamw_torch", "dataloader_pin_memory": False, "skip_memory_metrics": False,
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}', "report_to": ["wandb", "tensorboard"],
        "local_rank": 1, "eval_steps": 0.5, "liger_kernel_config": {"rope": True}, "hub_token": "t",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--fp16"], {}), (["--bf16", "True"], {}), (["--fp16", "False"], {"fp16": False, "bf16": False}),
        (["--bf16", "False"], {"bf16": False}), (["--fp16", "--bf16"], {"fp16": True, "bf16": True}),
        (["--warmup_ratio", "0.2", "--warmup_steps", "9"], {"warmup_steps": 9}), ([], {}),
    ],
)  # fmt: skip
def test_half_precision_is_what_the_hardware_has(monkeypatch: pytest.MonkeyPatch, argv: list[str], wanted) -> None:
    import torch

    from retune.model import device

    monkeypatch.setattr(device, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(device, "has_bf16", lambda *_: False)
    assert arguments.arguments(training(*argv)) == wanted


def test_a_section_may_be_asked_for_none() -> None:
    assert training("--mask_false_negatives", "none").section("train", TrainConfig).mask_false_negatives is None
    assert training("--grad_cache", "false").section("train", TrainConfig).grad_cache is False
    assert training("--grad_cache", "auto").section("train", TrainConfig).grad_cache == "auto"


def test_what_is_not_here_is_refused() -> None:
    for flag in train.NOT_HERE:
        given = training(f"--{flag.name}", str(not flag.default))
        with pytest.raises(UserError, match=f"^--{flag.name}: not here yet; leave it out$"):
            train._check(given, Path("nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--adam_beta3", "1"], "unknown flag --adam_beta3; did you mean --adam_beta"),
        (["--passage_max_length", "1"], "--passage_max_length: expected greater than or equal to 3, found '1'"),
        (["--family", "m4"], "--family: 'm4' is not supported; supported: encoder, m3, decoder, icl"),
        (["--unified_finetuning"], "has one head; set --family: m3"),
        (["--train_data", "no.jsonl"], "--train_data: no.jsonl: no such file, folder or match"),
        (["--model_name_or_path", "./none"], "model ./none: no such folder"),
        (["--use_mrl"], "--use_mrl: expected mrl_dims"),
        (["--max_steps", "x"], "--max_steps: invalid int value: 'x'"),
        (["--deepspeed", "no.json"], "--deepspeed: no.json: no such file"),
        (["--resume_from_checkpoint", "o"], "--resume_from_checkpoint: an interrupted run is resumed by itself"),
        (["--from_peft", "a", "--raw_peft", "b"], "--from_peft and --raw_peft: expected one of them"),
        (["--continue_adapters"], "--continue_adapters: expected `use_lora: true`"),
        (["--use_lora", "--continue_adapters"], "--continue_adapters: expected --raw_peft, the adapters to go on from"),
        (["--use_lora", "--target_modules", "q_proj"], "--target_modules: "),
        (["--pad_to_multiple_of", "100"], "--pad_to_multiple_of: a text of "),
        (["--lr_scheduler_type", "none"], "none is not a valid SchedulerType"),
        (["--per_device_train_batch_size", "99", "--dataloader_drop_last"],
         "24 training queries do not fill one batch of 99 × 1 processes"),
        (["--train_group_size", "1", "--use_inbatch_neg", "False"], "--train_group_size: 1 leaves a query nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder: Folder, flags: list[str], message: str) -> None:
    said = folder.said(*flags, code=1)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and "train.args" not in errors[0]
    assert not (folder.out / "config.json").exists()
