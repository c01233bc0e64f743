"""Flags: both spellings of everything, defaults of the config, and mistakes that name the flag."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from retune.cli import STAGES, main
from retune.commands import embed, evaluate, mine, models, score, split, train
from retune.commands.flags import Flag, Given, parse
from retune.config import EmbedConfig, EmbedderConfig, MineConfig, RerankerConfig
from retune.runtime import UserError

FILES = ["--input_file", "a", "--output_file", "b"]

# What the incumbents' own --help names (hn_mine.py in its newer and its older form, split_data_by_length.py,
# add_reranker_score.py, finetune.embedder.encoder_only.base and .m3, decoder_only.base, the older
# baai_general_embedding.finetune.run).
INCUMBENTS = {
    mine: "input_file output_file range_for_sampling similarity_range negative_number candidate_pool "
    "use_gpu_for_searching search_batch_size embedder_name_or_path model_name_or_path embedder_model_class "
    "normalize_embeddings pooling_method use_fp16 devices query_instruction_for_retrieval "
    "query_instruction_format_for_retrieval examples_for_task examples_instruction_format trust_remote_code cache_dir "
    "embedder_batch_size batch_size embedder_query_max_length embedder_passage_max_length",
    split: "input_path output_dir cache_dir log_name length_list model_name_or_path num_proc overwrite",
    score: "input_file output_file use_fp16 use_bf16 devices trust_remote_code reranker_name_or_path "
    "reranker_model_class reranker_peft_path query_instruction_for_rerank query_instruction_format_for_rerank "
    "passage_instruction_for_rerank passage_instruction_format_for_rerank cache_dir reranker_batch_size "
    "reranker_query_max_length reranker_max_length normalize prompt cutoff_layers compress_ratio compress_layers",
    train: "model_name_or_path config_name tokenizer_name cache_dir trust_remote_code token train_data cache_path "
    "train_group_size query_max_len passage_max_len pad_to_multiple_of max_example_num_per_dataset "
    "query_instruction_for_retrieval query_instruction_format knowledge_distillation passage_instruction_for_retrieval "
    "passage_instruction_format shuffle_ratio same_dataset_within_batch small_threshold drop_threshold "
    "negatives_cross_device temperature fix_position_embedding sentence_pooling_method normalize_embeddings "
    "sub_batch_size kd_loss_type colbert_dim unified_finetuning use_self_distill fix_encoder self_distill_start_step "
    "normlized normalized use_inbatch_neg output_dir overwrite_output_dir peft_model_path use_lora lora_rank "
    "lora_alpha lora_dropout target_modules use_flash_attn use_slow_tokenizer from_peft modules_to_save raw_peft "
    "additional_special_tokens save_merged_lora_model only_merge_lora_model use_fast_tokenizer",
}


def mining(*argv: str) -> Given:
    return parse("mine", mine.FLAGS, "", [*FILES, *argv])


@pytest.mark.parametrize("module", INCUMBENTS, ids=lambda module: module.__name__)
def test_the_incumbents_flags_are_known(module) -> None:
    assert set(INCUMBENTS[module].split()) <= {name for flag in module.FLAGS for name in flag.names}


def test_every_mining_key_is_a_flag() -> None:
    keys = {flag.key for flag in mine.FLAGS}
    assert {f"mine.{key}" for key in MineConfig.model_fields} - keys == {"mine.embedder", "mine.shards"}
    assert {f"embedder.{key}" for key in EmbedderConfig.model_fields} <= keys
    assert {f"reranker.{key}" for key in RerankerConfig.model_fields} - keys == {"reranker.fit"}
    assert {f"embed.{key}" for key in EmbedConfig.model_fields} - keys == {"embed.cache", "embed.heads"}


@pytest.mark.parametrize("module", [embed, evaluate, mine, score, split, train], ids=lambda module: module.__name__)
def test_no_spelling_means_two_things(module) -> None:
    names = [name for flag in module.FLAGS for name in flag.names]
    assert len(names) == len(set(names)) and all(name == name.replace("-", "_") for name in names)


def test_defaults_are_the_configs() -> None:
    assert mining().section("mine", MineConfig) == MineConfig()
    found = models.embedder(mining("--model_name_or_path", "m"))
    assert found == EmbedderConfig(model="m", query_max_length=512, passage_max_length=512)


@pytest.mark.parametrize(
    "argv",
    [
        ["--negative_number", "3", "--range_for_sampling", "2-200"],
        ["--negative-number=3", "--range-for-sampling=2-200"],
        ["--negative_number", "7", "--range-for_sampling", "2-200", "--negative-number", "3"],
    ],
)
def test_spellings(argv: list[str]) -> None:
    found = mining(*argv).section("mine", MineConfig)
    assert (found.negative_number, found.range_for_sampling) == (3, "2-200")


def test_old_and_new_names_are_one_flag() -> None:
    for name in ("--embedder_name_or_path", "--model_name_or_path"):
        assert mining(name, "m")["embedder_name_or_path"] == "m"
    assert mining("--batch_size", "8")["embedder_batch_size"] == 8


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None), (["--normalize_embeddings"], True), (["--normalize_embeddings", "True"], True),
        (["--normalize_embeddings", "False"], False), (["--normalize-embeddings=false"], False),
        (["--no_normalize_embeddings"], False), (["--normalize_embeddings", "0"], False),
        (["--normalize_embeddings", "yes", "--seed", "1"], True), (["--normalize_embeddings", "--seed", "1"], True),
    ],
)  # fmt: skip
def test_truth_values(argv: list[str], value: bool | None) -> None:
    assert mining(*argv)["normalize_embeddings"] is value


def test_a_value_may_look_like_a_flag() -> None:
    given = mining("--query_instruction_for_retrieval=--a-b: ", "--max_score_of_teacher", "-1.5")
    assert given["query_instruction"] == "--a-b: "
    assert given.section("mine", MineConfig).max_score_of_teacher == -1.5


def test_a_formats_line_break_is_meant() -> None:
    format = "Instruct: {}\\nQuery: {}"
    found = models.embedder(mining("--model_name_or_path", "m", "--query_instruction_format_for_retrieval", format))
    assert found.query_instruction_format == "Instruct: {}\nQuery: {}"


def test_choices_that_are_numbers() -> None:
    found = models.reranker(
        mining("--reranker_name_or_path", "r", "--compress_ratio", "4", "--cutoff_layers", "8", "9")
    )
    assert (found.compress_ratio, found.cutoff_layers) == (4, [8, 9])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--range_for_samplin", "1-2"], "unknown flag --range_for_samplin; did you mean --range_for_sampling?"),
        (["--negatives-number=2"], "unknown flag --negatives_number; did you mean --negative_number?"),
        (["--frobnicate", "1"], "unknown flag --frobnicate; `--help` shows all flags"),
        (["--range", "1-2"], "unknown flag --range; did you mean --range_for_sampling?"),
        (["--zzz"], "unknown flag --zzz; `--help` shows all flags"),
        (["--sampling", "best"], "--sampling: expected one of random, top; found 'best'"),
        (["--use_fp16", "perhaps"], "--use_fp16: expected True or False, found 'perhaps'"),
        (["--seed"], "--seed: expected one argument"),
        (["a.jsonl"], "unexpected 'a.jsonl'"),
    ],
)
def test_mistakes_in_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=r"^retune mine: ") as caught:
        mining("--input_file", "x", "--output_file", *(["y", *argv]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_unknown_flags_are_named() -> None:
    with pytest.raises(UserError) as caught:
        mining("--aaa", "--negative_numbr", "1")
    assert str(caught.value).count("unknown flag") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--negative-number", "0"], "--negative_number: expected greater than or equal to 1, found '0'"),
        (["--negative_number", "x"], "--negative_number: expected a valid integer"),
        (["--range_for_sampling", "9-3"], "--range_for_sampling: expected the smaller number first, found 9-3"),
    ],
)
def test_mistakes_in_values(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        mining(*argv).section("mine", MineConfig)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--embedder_name_or_path: required, but not given"),
        (["--batch_size", "1", "--model_name_or_path", "m", "--embedder_model_class", "decoder-only-icm"],
         "--embedder_model_class: 'decoder-only-icm' is not supported; supported: encoder-only-base"),
        (["--model_name_or_path", "m", "--examples_for_task", '[{"query": "q"}]'], "--examples_for_task: "),
        (["--model_name_or_path", "m", "--query_instruction_format", "{}"],
         "--query_instruction_format: expected two places written {}"),
        (["--model_name_or_path", "m", "--use_fp16", "--dtype", "float32"], "--dtype and --use_fp16: expected one"),
        (["--model_name_or_path", "m", "--use_fp16", "--use_bf16"], "--use_fp16 and --use_bf16: expected one"),
    ],
)  # fmt: skip
def test_mistakes_in_models(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        models.embedder(mining(*argv))
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "family"), models.FAMILIES.items())
def test_model_classes_are_families(name: str, family: str) -> None:
    assert models.embedder(mining("--model_name_or_path", "m", "--embedder_model_class", name)).family == family


# ---- hardware -----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, which the process may see all; the environment is put back at the end."""
    import torch

    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: min(2, len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))))
    return monkeypatch


@pytest.mark.parametrize(
    ("words", "visible", "names"),
    [
        (["cuda:1"], "1", ["cuda:0"]), (["cuda:0", "cuda:1"], "0,1", ["cuda:0", "cuda:1"]),
        (["1,0"], "1,0", ["cuda:0", "cuda:1"]), (["cpu"], "", ["cpu"]), (["cuda"], "0", ["cuda:0"]),
    ],
)  # fmt: skip
def test_devices_are_the_only_visible_ones(machine, words, visible, names) -> None:
    assert models.prepare(mining("--devices", *words)) == names
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_devices_count_among_the_visible_ones(machine) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert models.prepare(mining("--devices", "cuda:1")) == ["cuda:0"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    with pytest.raises(UserError, match="this process may use 1 GPUs"):
        models.prepare(mining("--devices", "cuda:1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tpu:0"], "--devices: expected cpu, or GPUs such as cuda:0 cuda:1, found 'tpu:0'"),
        (["cpu", "cuda:0"], "--devices: expected GPUs only or none"),
        (["0", "1", "2"], "--devices: this machine has no such GPU"),
    ],
)
def test_mistakes_in_devices(machine, words, message) -> None:
    with pytest.raises(UserError, match=message):
        models.prepare(mining("--devices", *words))


def test_no_devices_leave_the_environment_alone(machine) -> None:
    assert models.prepare(mining()) == [] and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_cache_dir_is_where_the_hub_looks(machine, tmp_path) -> None:
    from huggingface_hub import constants

    machine.setattr(constants, "HF_HUB_CACHE", "before")
    models.use_cache(mining("--cache_dir", str(tmp_path)))
    assert os.environ["HF_HUB_CACHE"] == constants.HF_HUB_CACHE == str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "device", "bf16", "dtype"),
    [
        (["--use_fp16"], "cuda", True, "float16"), (["--use_fp16"], "cpu", False, "float32"),
        (["--use_fp16"], "cpu", True, "bfloat16"), (["--use_fp16", "False"], "cuda", True, "float32"),
        (["--use_bf16"], "cuda", True, "bfloat16"), (["--use_bf16"], "cpu", False, "float32"),
        ([], "cuda", True, "auto"),
    ],
)  # fmt: skip
def test_half_precision_is_what_the_hardware_has(monkeypatch, argv, device, bf16, dtype) -> None:
    import torch

    from retune.model import device as hardware

    monkeypatch.setattr(hardware, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(hardware, "has_bf16", lambda *_: bf16)
    assert models.embedder(mining("--model_name_or_path", "m", *argv)).dtype == dtype


@pytest.mark.parametrize(
    ("argv", "device", "budget"),
    [
        (["--batch_size", "64"], "cuda", 64 * 512), (["--batch_size", "3000"], "cuda", None),
        (["--embedder_batch_size", "2"], "cpu", 1024), (["--batch_size", "3000"], "cpu", None), ([], "cuda", None),
        (["--batch_size", "2", "--max_tokens_per_batch", "99"], "cpu", None),
    ],
)  # fmt: skip
def test_a_batch_size_bounds_the_tokens(monkeypatch, argv, device, budget) -> None:
    import torch

    from retune.model import device as hardware

    monkeypatch.setattr(hardware, "best_device", lambda: torch.device(device))
    wanted = {} if budget is None else {"max_tokens_per_batch": budget}
    assert models.token_budget(mining(*argv), "embedder_batch_size", 512, "float32") == wanted


def test_a_batch_size_is_a_number() -> None:
    with pytest.raises(UserError, match="--batch_size: expected a whole number from 1 on, found 'many'"):
        mining("--batch_size", "many")


# ---- messages and help --------------------------------------------------------------------------


def test_messages_name_flags_for_config_keys() -> None:
    given = mining("--batch_size", "1", "--vector_dtype", "float32")
    said = given.in_flags(
        "set embedder.dtype and embed.dtype to float32, or `mine.on_shortage: drop`; widen mine.range_for_sampling, "
        "not mine.range_for_sampling_x or my.mine.seed"
    )
    assert said == (
        "set --embedder_dtype and --vector_dtype to float32, or `--on_shortage drop`; widen --range_for_sampling, "
        "not mine.range_for_sampling_x or my.mine.seed"
    )


@pytest.mark.parametrize("command", STAGES)
def test_help_shows_every_flag_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"retune.commands.{command}")
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for flag in module.FLAGS:
        assert f"--{', --'.join(flag.names)} " in shown
    assert shown.count("(default: ") + shown.count("(required)") == len(module.FLAGS)


def test_help_shows_the_configs_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mine", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "from which negatives are drawn. (default: 10-210)" in shown
    assert "(default: 0 500 1000 2000 3000 4000 5000 6000 7000)" in shown


def test_a_flag_needs_no_config_key() -> None:
    flags = [Flag(("n",), "Number.", convert=int, default=3), Flag(("xs",), "Many.", kind="list", convert=int)]
    given = parse("test", flags, "", ["--xs", "1", "2"])
    assert (given["n"], given["xs"], given.typed("n"), given.typed("xs")) == (3, [1, 2], False, True)
    with pytest.raises(UserError, match="--xs: invalid int value: 'a'"):
        parse("test", flags, "", ["--xs", "a"])


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in STAGES)], ids=" ".join)
def test_help_is_light(argv: list[str]) -> None:
    code = (
        f"import sys; from retune.cli import main\ntry: main({argv})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'faiss', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
