"""Merging: bit for bit where nothing should change, equal to a plain sum elsewhere, loud where models do not fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from retune.model import summing
from retune.model import weights as storage
from retune.runtime import UserError
from retune.stages.merge import merge

CONFIG = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip


def model(folder: Path, seed: int, dtype=torch.float32, kind=BertModel, **options) -> Path:
    torch.manual_seed(seed)
    kind(CONFIG, **options).to(dtype).save_pretrained(folder)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change) -> Path:
    """Save a checkpoint's tensors again after `change(tensors)`."""
    tensors = state(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def pair(tmp_path):
    return model(tmp_path / "base", 1), model(tmp_path / "tuned", 2)


# ---- the sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_weighted_sum(tmp_path, monkeypatch, dtype, piece):
    monkeypatch.setattr(summing, "PIECE", piece)
    a, b, c = (model(tmp_path / str(seed), seed, dtype) for seed in (1, 2, 3))
    merge(models=[a, b, c], weights=[0.2, 0.5, 0.3], out=tmp_path / "out")
    one, two, three, found = (state(folder) for folder in (a, b, c, tmp_path / "out"))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        exact = 0.2 * one[name].double() + 0.5 * two[name].double() + 0.3 * three[name].double()
        assert tensor.dtype == dtype
        if dtype == torch.bfloat16:
            exact = exact.float().to(dtype)
        else:  # numpy: torch goes from float64 to float16 through float32, and rounds twice
            exact = torch.from_numpy(exact.numpy().astype(str(dtype).removeprefix("torch.")))
        assert torch.equal(tensor, exact), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [1 / 3, 2 / 3]])
def test_a_model_with_itself_is_itself(tmp_path, dtype, weights):
    a = model(tmp_path / "a", 1, dtype)
    rewrite(a, lambda t: t["embeddings.LayerNorm.bias"].copy_(torch.tensor([-0.0, 0.0, 1e-42, -1e-45] * 4)))
    merge(models=[a, a], weights=weights, out=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()


def test_weights_one_and_zero_give_the_first_bit_for_bit(pair, tmp_path):
    base, tuned = pair
    rewrite(base, lambda t: t["embeddings.LayerNorm.bias"].copy_(torch.tensor([-0.0, 1e-42] * 8)))
    rewrite(tuned, lambda t: t["embeddings.LayerNorm.bias"].fill_(torch.nan))  # not even read
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"mark": "base"}))
    merge(models=[base, tuned], weights=[1, 0], out=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_first_model_decides_the_precision_and_config_says_so(tmp_path):
    a, b = model(tmp_path / "a", 1, torch.bfloat16), model(tmp_path / "b", 2, torch.float32)
    merge(models=[a, b], weights=[0.5, 0.5], out=tmp_path / "out")
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert BertModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_integer_buffers_are_copied_and_must_be_equal(pair, tmp_path):
    _, tuned = pair
    for folder in pair:
        rewrite(folder, lambda t: t.update({"embeddings.ids": torch.arange(32)[None], "flag": torch.tensor(True)}))
    merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    found = state(tmp_path / "out")
    assert torch.equal(found["embeddings.ids"], torch.arange(32)[None]) and found["flag"].item() is True
    rewrite(tuned, lambda t: t["embeddings.ids"].add_(1))
    with pytest.raises(UserError, match=r"embeddings\.ids: integers that differ"):
        merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")


def test_rounding_to_bfloat16_is_torchs():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=20_000), rng.normal(size=2000) * 1e-38, [0.0, -0.0, 3.3e38]])
    values = values.astype(np.float32).astype(np.float64)
    found = storage.from_float64(values, "BF16")
    expected = torch.from_numpy(values).float().bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(found, expected)
    back = torch.from_numpy(found).view(torch.bfloat16).double().numpy()
    assert np.array_equal(storage.to_float64(found, "BF16"), back)


# ---- forms of checkpoints -----------------------------------------------------------------------


def test_shards_and_pickles_give_what_single_files_give(pair, tmp_path):
    base, tuned = pair
    merge(models=pair, weights=[0.4, 0.6], out=tmp_path / "plain")
    sharded = tmp_path / "sharded"
    BertModel.from_pretrained(base).save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and not (sharded / "model.safetensors").exists()
    pickled = tmp_path / "pickled"
    shutil.copytree(tuned, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state(tuned), pickled / "pytorch_model.bin")
    merge(models=[sharded, pickled], weights=[0.4, 0.6], out=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"config.json", "model.safetensors"}  # neither index nor pickle stays behind


def test_pickles_of_bfloat16_and_of_the_old_format(tmp_path):
    for name, options in {"new": {}, "old": {"_use_new_zipfile_serialization": False}}.items():
        folder = model(tmp_path / name, 1, torch.bfloat16)
        tensors = state(folder)
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        merge(models=[folder], weights=[1], out=tmp_path / "out")
        found = state(tmp_path / "out")
        assert all(torch.equal(found[key], tensors[key]) for key in tensors) and found.keys() == tensors.keys()


def test_a_backbone_beneath_a_head_is_matched_by_its_prefix(pair, tmp_path):
    _, tuned = pair
    masked = model(tmp_path / "masked", 5, kind=BertForMaskedLM)
    beneath = {n.removeprefix("bert."): t for n, t in state(masked).items() if n.startswith("bert.")}
    merge(models=[masked, tuned], weights=[0.5, 0.5], out=tmp_path / "out")
    found, two = state(tmp_path / "out"), state(tuned)
    assert found.keys() == two.keys()  # the head `cls` is left out; the pooler is the tuned model's
    assert all(torch.equal(found[n], 0.5 * beneath[n] + 0.5 * two[n]) for n in beneath)
    assert torch.equal(found["pooler.dense.weight"], two["pooler.dense.weight"])

    merge(models=[masked, masked], weights=[0.5, 0.5], out=tmp_path / "same")
    assert state(tmp_path / "same").keys() == state(masked).keys()
    with pytest.raises(UserError, match=r"cls\.predictions\.\S+: not in \S*tuned"):
        merge(models=[tuned, masked], weights=[0.5, 0.5], out=tmp_path / "out")


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_missing_pooler_is_copied_from_the_one_that_has_it(tmp_path, lacking):
    folders = [model(tmp_path / str(i), i, add_pooling_layer=i != lacking) for i in (0, 1)]
    merge(models=folders, weights=[0.5, 0.5], out=tmp_path / "out")
    found, has = state(tmp_path / "out"), state(folders[1 - lacking])
    assert torch.equal(found["pooler.dense.weight"], has["pooler.dense.weight"])
    assert found.keys() == has.keys()


def test_the_rest_of_the_folder_is_the_last_models(pair, tmp_path):
    base, tuned = pair
    for folder, prompt in ((base, "old: "), (tuned, "new: ")):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text("{}")
        entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        entries.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": prompt}}))
        for name in ("README.md", "training_args.bin", "optimizer.pt", "pytorch_model.bin", ".gitattributes"):
            (folder / name).write_text("not to be copied")
        (folder / "checkpoint-10").mkdir()
        (folder / "vocab.txt").write_text(prompt)
    merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert made == {
        "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "vocab.txt",
        "config_sentence_transformers.json",
    }  # fmt: skip
    assert (tmp_path / "out/vocab.txt").read_text() == "new: "


def test_the_merged_model_loads(pair, tmp_path):
    merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    loaded = BertModel.from_pretrained(tmp_path / "out").state_dict()
    one, two = (state(folder) for folder in pair)
    assert all(torch.equal(loaded[name], 0.5 * one[name] + 0.5 * two[name]) for name in one)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- what does not fit --------------------------------------------------------------------------


def test_all_differences_are_told_at_once_and_nothing_is_written(pair, tmp_path):
    _, tuned = pair

    def change(tensors):
        tensors["encoder.layer.9.new"] = torch.zeros(2)
        del tensors["encoder.layer.0.output.dense.bias"]
        tensors["embeddings.LayerNorm.weight"] = torch.ones(3)
        tensors["embeddings.LayerNorm.bias"] = torch.ones(16, dtype=torch.int64)

    rewrite(tuned, change)
    with pytest.raises(UserError) as error:
        merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    text = str(error.value)
    assert "4 differences" in text
    for part in ("layer.9.new: not in", "0.output.dense.bias: in", "[16] in", "[3] in", "LayerNorm.bias: F32 in"):
        assert part in text, part
    assert not (tmp_path / "out").exists()


def test_an_earlier_result_survives_a_failure(pair, tmp_path):
    _, tuned = pair
    merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    rewrite(tuned, lambda t: t["pooler.dense.bias"].fill_(torch.nan))  # written last, found while writing
    with pytest.raises(UserError, match=r"pooler\.dense\.bias: the sum is not finite"):
        merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "out"}


def test_a_sum_beyond_the_range_of_the_numbers_is_refused(tmp_path):
    a = model(tmp_path / "a", 1, torch.float16)
    rewrite(a, lambda t: t["pooler.dense.bias"].fill_(60_000))
    with pytest.raises(UserError, match="not finite in F16"):
        merge(models=[a, a], weights=[1, 1], out=tmp_path / "out")


@pytest.mark.parametrize("weights", [[0.5], [0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_make_no_sense(pair, tmp_path, weights):
    with pytest.raises(UserError, match=r"merge\.weights: expected"):
        merge(models=pair, weights=weights, out=tmp_path / "out")


def test_weights_that_do_not_sum_to_one_are_told(pair, tmp_path, caplog):
    merge(models=pair, weights=[0.5, 0.6], out=tmp_path / "out")
    assert "they sum to 1.1" in caplog.text


def test_truncated_and_missing_weights(pair, tmp_path):
    _, tuned = pair
    whole = (tuned / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) - 1):
        (tuned / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"tuned/model\.safetensors: not a whole safetensors file"):
            merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    (tuned / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"tuned: no model\.safetensors"):
        merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")
    (tuned / "pytorch_model.bin").write_bytes(b"PK not a pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        merge(models=pair, weights=[0.5, 0.5], out=tmp_path / "out")


# ---- the writer, and memory ---------------------------------------------------------------------


def test_the_writer_writes_what_safetensors_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.normal(size=(3, 5)).astype(np.float32), "a": rng.normal(size=7).astype(np.float16),
        "ids": np.arange(6).reshape(2, 3), "scalar": np.array(2.5, np.float64), "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False, True]),
    }  # fmt: skip
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "float64": "F64", "bool": "BOOL"}
    save_numpy(arrays, tmp_path / "theirs", {"format": "pt"})
    entries = [
        (n, kinds[a.dtype.name], a.shape, lambda a=a: iter(np.array_split(a.ravel(), 2))) for n, a in arrays.items()
    ]
    storage.write_safetensors(tmp_path / "ours", entries)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_writer_refuses_pieces_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="x: its pieces"):
        storage.write_safetensors(tmp_path / "file", [("x", "F32", (4,), lambda: iter([np.zeros(3, np.float32)]))])


MEASURE = """
import resource, sys
from pathlib import Path
from retune.stages.merge import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(models=sys.argv[1:3], weights=[0.5, 0.5], out=Path(sys.argv[3]))
assert "torch" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_models(tmp_path):
    """Two models of 96 MB, most of it one tensor: merging takes a fraction of one tensor."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_numpy({"big": np.ones((20_000, 1024), np.float32), "small": np.ones((4096, 1024), np.float32)},
                   tmp_path / name / "model.safetensors")  # fmt: skip
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("a", "b", "out"))]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 60, f"{grown} MB more than before"
