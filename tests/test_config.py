"""The config: one source for defaults, schema and messages."""

import json
from pathlib import Path

import pytest
import yaml

from retune.config import Config, bounds
from retune.experiment import ConfigError, deep_merge, known_paths, load, schema, training_argument_names

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"embedder": {"model": "m"}, "ingest": {"train": "a.jsonl"}}


def lines(raw: dict, files: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(raw, files or [])
    return error.value.lines


def test_schema_file_is_generated_from_the_sections() -> None:
    found = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert found == schema(), "run: retune schema > workflow/schemas/config.schema.json"


def test_config_yaml_is_valid_and_says_nothing_twice() -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    runs = load(raw, ["config.yaml"]).runs
    assert list(runs) == ["demo", "demo.no_teacher"]
    assert runs["demo"].name == "demo" and runs["demo.no_teacher"].score is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_example_configs_are_valid(path: Path) -> None:
    load(yaml.safe_load(path.read_text()), [str(path)])


def test_reference_page_tells_every_key_with_its_default() -> None:
    from retune.reference import page

    assert (ROOT / "docs/config.md").read_text() == page(), "run: retune reference > docs/config.md"


def test_defaults_of_the_contract() -> None:
    config = load(SMALL).runs["run"]
    assert config.seed == 42
    assert config.mine.range_for_sampling == "10-210" and config.mine.negative_number == 15
    assert config.split.length_list == [0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000]
    assert config.evaluate.k == 100 and config.evaluate.cutoffs == [1, 10, 100]
    assert config.evaluate.models == ["base", "tuned", "merged"]
    assert config.score is None and config.reranker is None


def test_five_mistakes_give_five_lines_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "name: x\n"
        "embedder: {model: a, pooling: max}\n"
        "ingest:\n"
        "  train: a.jsonl\n"
        "  dev_fraction: 2\n"
        "mine: {negative_nmber: 3}\n"
        "train:\n"
        "  learning_rate: 1e-5\n"
        "  args: {lerning_rate: 1}\n"
    )
    assert lines(yaml.safe_load(file.read_text()), [str(file)]) == [
        f"{file}:2: embedder.pooling: expected 'cls', 'mean' or 'last_token', found 'max'",
        f"{file}:5: ingest.dev_fraction: expected less than 1, found 2",
        f"{file}:6: mine.negative_nmber: unknown key; did you mean mine.negative_number?",
        f"{file}:8: train.learning_rate: unknown key; did you mean train.args.learning_rate?",
        f"{file}:9: train.args.lerning_rate: unknown key; did you mean train.args.learning_rate?",
    ]


def test_a_key_that_is_there_twice_is_a_mistake(tmp_path: Path) -> None:
    """YAML takes the last one without a word: what the first one sets would be lost."""
    file = tmp_path / "twice.yaml"
    file.write_text(
        "embedder: {model: m}\n"
        "ingest: {train: a.jsonl}\n"
        "train:\n"
        "  temperature: 0.05\n"
        "variants:\n"
        "  cold: &cold {train: {temperature: 1}}\n"
        "  other:\n"
        "    <<: *cold\n"
        "    seed: 1\n"
        "train: {train_group_size: 4}\n"
    )
    assert lines(yaml.safe_load(file.read_text()), [str(file)]) == [
        f"{file}:10: train: given twice, first in line 3; put both into one"
    ]


def test_missing_sections_are_named() -> None:
    assert lines({}) == ["embedder: required, but not given", "ingest: required, but not given"]


def test_what_one_section_needs_of_another() -> None:
    assert "reranker" in lines(SMALL | {"score": {}})[0]
    assert lines(SMALL | {"train": None, "evaluate": {"models": ["base", "tuned"]}}) == [
        "evaluate.models: `tuned` needs the section `train`, which is off"
    ]
    threshold = {"mine": {"max_score_of_teacher": 0.0}}
    assert lines(SMALL | threshold) == [
        "mine.max_score_of_teacher: expected a section `reranker` that names the teacher"
    ]
    assert (
        "needs the section `score`"
        in lines(SMALL | threshold | {"reranker": {"model": "r", "fit": {}}, "score": None})[0]
    )
    assert "cutoffs" in lines(SMALL | {"evaluate": {"k": 10, "cutoffs": [1, 100]}})[0]
    assert lines(SMALL | {"evaluate": {"benchmarks": {"train": {"path": "data"}}}}) == [
        "evaluate.benchmarks.train: the training texts are called so; expected another name"
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": {"use_lora": True, "save_merged_lora_model": False}}, "`tuned` is adapters alone"),
        ({"embedder": {"model": "m", "peft_path": "a"}}, "of `base`, adapters (embedder.peft_path) are not merged"),
        ({"train": {"additional_special_tokens": "<q>"}}, "`tuned` has tokens"),
    ],
)
def test_what_cannot_be_merged_is_not(changed: dict, message: str) -> None:
    config = load(SMALL | changed).runs["run"]
    assert config.merge is None and config.evaluate.models == ["base", "tuned"]
    [line] = lines(SMALL | changed | {"merge": {}})
    assert line.startswith("merge.models: ") and message in line and line.endswith("; set `merge: null`")


def test_adapters_to_go_on_from_must_be_named() -> None:
    assert lines(SMALL | {"train": {"use_lora": True, "continue_adapters": True}}) == [
        "train.continue_adapters: expected embedder.peft_path, the adapters to go on from"
    ]
    assert "train: continue_adapters: expected `use_lora: true`" in lines(
        SMALL | {"train": {"continue_adapters": True}}
    )


def test_a_token_has_no_place_in_a_config() -> None:
    assert load(SMALL | {"token": "MY_TOKEN", "cache_dir": "models"}).runs["run"].token == "MY_TOKEN"
    [line] = lines(SMALL | {"token": "hf_" + "abc"})
    assert line == "token: expected the name of an environment variable, found a token: its value would be in results/"


def test_stages_switched_off() -> None:
    config = load(SMALL | {"train": None}).runs["run"]
    assert config.merge is None and config.evaluate.models == ["base"]


def test_variant_reports_only_its_own_mistakes() -> None:
    raw = SMALL | {"train": {"temperature": -1}, "variants": {"a": {"mine": {"x": 1}}, "b": {"name": "other"}}}
    found = lines(raw)
    assert len(found) == 3
    assert found[0].startswith("train.temperature: expected greater than 0")
    assert found[1].startswith("variants.a.mine.x: unknown key")
    assert found[2] == "variants.b.name: a variant cannot change this key"


def test_a_variant_that_another_sections_key_breaks_is_reported() -> None:
    raw = SMALL | {"reranker": {"model": "r"}, "score": {}, "variants": {"bare": {"reranker": None}}}
    assert lines(raw) == [
        "variants.bare.score: expected a section `reranker` that names the teacher (or `score: null`)"
    ]


def test_variant_references() -> None:
    first = {"embedder": {"model": "variant:two"}}
    assert (
        "no variant `variant:zwei`" in lines(SMALL | {"variants": {"two": {"embedder": {"model": "variant:zwei"}}}})[0]
    )
    assert "circle" in lines(SMALL | {"variants": {"one": first, "two": {"embedder": {"model": "variant:one"}}}})[0]
    runs = load(SMALL | {"variants": {"second": {"mine": {"embedder": {"model": "variant:run"}}}}}).runs
    assert runs["run.second"].mine.embedder.model == "variant:run"


def test_yaml_numbers_written_with_an_exponent_are_numbers() -> None:
    raw = yaml.safe_load("train: {temperature: 2e-2, args: {learning_rate: 1e-5, optim: adamw_torch}}")
    assert isinstance(raw["train"]["temperature"], str)  # that is how YAML reads it
    train = load(SMALL | raw).runs["run"].train
    assert train.temperature == 0.02 and train.args == {"learning_rate": 1e-5, "optim": "adamw_torch"}


def test_datasets_from_paths_lists_and_mappings() -> None:
    def names(train):
        return {n: d.path for n, d in load(SMALL | {"ingest": {"train": train}}).runs["run"].ingest.train.items()}

    assert names("data/nli.jsonl.gz") == {"nli": ["data/nli.jsonl.gz"]}
    assert names(["a/x.jsonl", "b/x.jsonl", "all/*.jsonl"]) == {
        "x": ["a/x.jsonl"], "x_2": ["b/x.jsonl"], "train": ["all/*.jsonl"]
    }  # fmt: skip
    assert names({"q": {"path": ["a", "b"]}, "r": "c"}) == {"q": ["a", "b"], "r": ["c"]}


def test_windows() -> None:
    assert bounds(Config.model_validate(SMALL | {"mine": {"range_for_sampling": [2, 20]}}).mine.range_for_sampling) == (
        2,
        20,
    )
    for wrong in ("20-2", "ten", 5, [1]):
        assert lines(SMALL | {"mine": {"range_for_sampling": wrong}})[0].startswith("mine.range_for_sampling: expected")


def test_deep_merge_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": [1]}}, {"a": {"b": 2}, "d": None}
    assert deep_merge(base, over) == {"a": {"b": 2, "c": [1]}, "d": None}
    assert base == {"a": {"b": 1, "c": [1]}} and over == {"a": {"b": 2}, "d": None}


def test_training_arguments_are_those_of_transformers() -> None:
    import dataclasses

    from transformers import TrainingArguments

    real = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert real <= set(training_argument_names())


def test_known_paths_hold_every_section() -> None:
    found = known_paths()
    assert "ingest.train.<name>.prompt" in found and "evaluate.benchmarks.<name>.qrels" in found
    assert "mine.embedder.pooling" in found and "reranker.fit.args" in found
