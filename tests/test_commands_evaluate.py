"""retune evaluate: what the scripts of FlagEmbedding and Intel would print, from files and from the hub."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import running
from tiny import some_texts, tiny_bert

from retune import tables
from retune.cli import main
from retune.commands.benchmark import N_PASSAGES, N_QUERIES, asked
from retune.commands.evaluate import FLAGS, INSTRUCTION
from retune.commands.flags import parse
from retune.config import EmbedderConfig
from retune.model.embedder import Embedder

N = 14  # queries
TEXTS = list(dict.fromkeys(some_texts(90, longest=12)))[:60]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("model") / "tiny"))


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def questions() -> list[dict]:
    """Query i begins as passage i does; it has one to three positives."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(N):
        more = rng.choice(np.arange(N, len(TEXTS)), i % 3, replace=False).tolist()
        rows.append({"query": " ".join(TEXTS[i].split()[:3]), "positive": [TEXTS[i], *(TEXTS[j] for j in more)]})
    return rows


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    corpus = write(tmp_path / "corpus.json", [{"content": text} for text in TEXTS])
    queries = write(tmp_path / "queries.json", questions())
    return ["--corpus_data", str(corpus), "--query_data", str(queries)]


def evaluated(capsys, *words: object) -> dict[str, float]:
    assert main(["evaluate", *map(str, words)]) == 0, capsys.readouterr().err
    return ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *words: object) -> str:
    assert main(["evaluate", *map(str, words)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def by_loops(model: str, instruction: str, cutoffs=(1, 10, 100), k: int = 100) -> dict[str, float]:
    """MRR and Recall on texts themselves, as eval_msmarco goes about it, with lengths of 32 and 128."""
    embedder = Embedder.load(
        EmbedderConfig(model=model, query_instruction=instruction, query_max_length=32, passage_max_length=128)
    )
    rows = questions()
    queries = embedder.encode_queries([row["query"] for row in rows]).astype(np.float64)
    scores = queries @ embedder.encode_passages(TEXTS).astype(np.float64).T
    found = {f"{name}@{cutoff}": 0.0 for name in ("MRR", "Recall") for cutoff in cutoffs}
    for row, line in zip(rows, scores, strict=True):
        ranked = [TEXTS[j] for j in np.argsort(-line, kind="stable")[:k]]
        for cutoff in cutoffs:
            hits = [rank for rank, text in enumerate(ranked[:cutoff], 1) if text in row["positive"]]
            found[f"MRR@{cutoff}"] += (1 / hits[0] if hits else 0) / N
            found[f"Recall@{cutoff}"] += len(hits) / min(cutoff, len(row["positive"])) / N
    return found


# ---- eval_msmarco -------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "instruction"), [([], ""), (["--add_instruction"], INSTRUCTION)])
def test_the_dict_of_eval_msmarco(capsys, files, model, flags, instruction) -> None:
    found = evaluated(capsys, "--encoder", model, "--fp16", *flags, "--k", 100, *files, "--vector_dtype", "float32")
    expected = by_loops(model, instruction)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < found["MRR@10"] < 1 and found["Recall@100"] == 1


def test_cutoffs_go_up_to_k(capsys, files, model) -> None:
    assert list(evaluated(capsys, "--encoder", model, *files, "--k", 20)) == [
        "MRR@1",
        "MRR@10",
        "Recall@1",
        "Recall@10",
    ]
    found = evaluated(capsys, "--encoder", model, *files, "--k", 20, "--cutoffs", 5, 20)
    assert list(found) == ["MRR@5", "MRR@20", "Recall@5", "Recall@20"]
    assert "--cutoffs: expected at most k = 20, found 30" in refused(
        capsys, "--encoder", model, *files, "--k", 20, "--cutoffs", 30
    )


@pytest.mark.parametrize("name", ["embeddings.memmap", "v.npy", "v.parquet"])
def test_saved_vectors_are_loaded(capsys, files, model, tmp_path, monkeypatch, name) -> None:
    words = ["--encoder", model, *files, "--save_path", tmp_path / name]
    first = evaluated(capsys, *words, "--save_embedding")
    assert (tmp_path / name).stat().st_size >= len(TEXTS) * 32 * 2
    if name == "embeddings.memmap":
        stored = np.memmap(tmp_path / name, np.float16, "r", shape=(len(TEXTS), 32))
        np.testing.assert_allclose(stored, Embedder.load(model).encode_passages(TEXTS), atol=1e-3)
    read = []
    monkeypatch.setattr(Embedder, "encode_texts", _counting(read, Embedder.encode_texts))
    assert evaluated(capsys, *words, "--load_embedding") == first
    assert read == ["query"]


def _counting(read: list[str], encode):
    def counting(self, texts, kind, *rest):
        read.append(kind)
        return encode(self, texts, kind, *rest)

    return counting


def test_vectors_that_do_not_fit(capsys, files, model, tmp_path) -> None:
    words = ["--encoder", model, *files, "--load_embedding", "--save_path"]
    (tmp_path / "v.memmap").write_bytes(bytes(100))
    shown = refused(capsys, *words, tmp_path / "v.memmap")
    assert f"v.memmap: 100 bytes, but {len(TEXTS)} passages of 32 dimensions take 3,840 (float16) or 7,680" in shown
    np.save(tmp_path / "v.npy", np.zeros((3, 32), np.float32))
    assert f"v.npy: vectors [3, 32], expected [passages, dimensions] = [{len(TEXTS)}, 32]" in refused(
        capsys, *words, tmp_path / "v.npy"
    )
    assert "no such file of vectors" in refused(capsys, *words, tmp_path / "none.npy")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "rows.parquet")
    assert "rows.parquet: expected a table with the column `vector`, found text" in refused(
        capsys, *words, tmp_path / "rows.parquet"
    )
    assert "--load_embedding: and --save_embedding: expected one of them" in refused(
        capsys, *words, tmp_path / "v.npy", "--save_embedding"
    )
    other = str(tiny_bert(tmp_path / "other", seed=1))
    evaluated(capsys, "--encoder", other, *files, "--save_embedding", "--save_path", tmp_path / "v.parquet")
    assert f"embedded by model {other}" in refused(capsys, *words, tmp_path / "v.parquet")


def test_an_index(capsys, files, model) -> None:
    words = ["--encoder", model, *files]
    exact = evaluated(capsys, *words)
    assert evaluated(capsys, *words, "--index_factory", "HNSW8", "--ef_search", 60) == exact
    assert evaluated(capsys, *words, "--index_factory", "IVF2,Flat", "--nprobe", 2) == exact
    missed = evaluated(capsys, *words, "--index_factory", "IVF8,Flat", "--nprobe", 1)
    assert missed["Recall@100"] < exact["Recall@100"]
    assert "--index_factory: faiss cannot make 'Flt'" in refused(capsys, *words, "--index_factory", "Flt")
    assert "--nprobe: an index 'HNSW8' has no nprobe" in refused(
        capsys, *words, "--index_factory", "HNSW8", "--nprobe", 3
    )


def test_an_interrupted_evaluation_goes_on(capsys, files, model, tmp_path, monkeypatch) -> None:
    words = ["--encoder", model, *files, "--work_dir", tmp_path / "work"]
    first = evaluated(capsys, *words)
    read = []
    monkeypatch.setattr(Embedder, "encode_texts", _counting(read, Embedder.encode_texts))
    assert evaluated(capsys, *words) == first and read == []
    assert list(evaluated(capsys, *words, "--cutoffs", 3)) == ["MRR@3", "Recall@3"] and read == []


# ---- Intel, and the workflow's own forms --------------------------------------------------------


def test_the_dict_of_intels_script(capsys, model, tmp_path) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"context": [text]} for text in TEXTS])
    asked = [{"query": row["query"], "pos": row["positive"][:1]} for row in questions()]
    words = ["--model_name", model, "--index_file_jsonl_path", corpus, "--query_file_jsonl_path"]
    found = evaluated(capsys, *words, write(tmp_path / "q.jsonl", asked))
    assert list(found) == ["MRR@1", "Hit@1"] and found["MRR@1"] == found["Hit@1"]
    more = evaluated(capsys, *words, tmp_path / "q.jsonl", "--cutoffs", 1, 10)
    assert list(more) == ["MRR@1", "MRR@10", "Hit@1", "Hit@10"] and more["Hit@10"] > found["Hit@1"]


def test_a_passage_within_a_positive_is_no_hit(capsys, model, tmp_path) -> None:
    """Their script asks whether the retrieved text is a substring of the positive."""
    corpus = write(tmp_path / "c.jsonl", [{"context": ["ba"]}, {"context": [f"ba {TEXTS[0]} {TEXTS[1]}"]}])
    queries = write(tmp_path / "q.jsonl", [{"query": "ba", "pos": [f"ba {TEXTS[0]} {TEXTS[1]}"]}])
    words = ["--model_name", model, "--index_file_jsonl_path", corpus, "--query_file_jsonl_path", queries]
    assert evaluated(capsys, *words, "--cutoffs", 1, 2) == {"MRR@1": 0.0, "MRR@2": 0.5, "Hit@1": 0.0, "Hit@2": 1.0}


def test_trec_run_and_table_say_the_same(capsys, model, tmp_path) -> None:
    """A BEIR folder, every passage there twice, so that scores tie; TREC's tools see the same ranking."""
    rows = [{"_id": f"d{i:03}", "title": "", "text": TEXTS[i % 30]} for i in range(60)]
    write(tmp_path / "set/corpus.jsonl", rows)
    write(tmp_path / "set/queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(questions())])
    qrels = write(tmp_path / "set/qrels/test.tsv", [f"q{i} 0 d{i + 30 * (i % 2):03} {1 + i % 3}" for i in range(N)])
    outputs = ["--save_run", tmp_path / "run.trec", "--save_metrics", tmp_path / "m.parquet"]
    found = evaluated(capsys, "--encoder", model, "--path", tmp_path / "set", "--k", 40, "--relevant_from", 2, *outputs)
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert len(lines) == 40 * N and lines[0].split()[1:2] + lines[0].split()[5:] == ["Q0", "tiny"]
    run, judged = ir_measures.read_trec_run(str(tmp_path / "run.trec")), ir_measures.read_trec_qrels(str(qrels))
    names = {"nDCG": "nDCG", "MAP": "AP(rel=2)", "P": "P(rel=2)", "MRR": "RR(rel=2)", "Hit": "Success(rel=2)"}
    theirs = {f"{ours}@{k}": ir_measures.parse_measure(f"{name}@{k}") for ours, name in names.items() for k in (1, 10)}
    means = ir_measures.calc_aggregate(list(theirs.values()), list(judged), list(run))
    assert {name: found[name] for name in theirs} == pytest.approx(
        {name: means[measure] for name, measure in theirs.items()}, abs=1e-9
    )
    table = tables.read(tmp_path / "m.parquet", "metrics").to_pylist()
    assert {f"{r['measure']}@{r['cutoff']}": r["value"] for r in table if r["query_id"] is None} == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus_data", "none.json", "--query_data", "none.json"], "--query_data: none.json: no such file"),
        (["--corpus_data", "corpus.json"], "--query_data: required, but not given: a file, or a data set on the hub"),
        (["--path", "nowhere"], "--path: nowhere: no such file"),
        (["--batch_siz", "3"], "unknown flag --batch_siz; did you mean --batch_size?"),
        (["--k", "0"], "--k: "),
        (["--qrels", "corpus.json", "--format", "msmarco"], "--qrels: nothing is read from there with format msmarco"),
        (
            ["--corpus_data", "corpus.json", "--query_data", "queries.json", "--format", "beir"],
            "benchmark: expected `path`, or `queries`, `corpus` and `qrels`",
        ),
        (["--path", "hub:BeIR/x@v1"], "--path: the judgments have a revision of their own; expected `qrels` too"),
        (["--k", "many"], "--k: expected a whole number from 1 on, found 'many'"),
    ],
)
def test_mistakes(capsys, files, model, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "--encoder", model, *words)


# ---- the hub ------------------------------------------------------------------------------------


CORPUS, QUERIES = "namespace-Pt/msmarco-corpus", "namespace-Pt/msmarco"


@pytest.mark.parametrize(
    ("words", "corpus", "queries"),
    [
        ([], f"hub:{CORPUS}", f"hub:{QUERIES}"),
        (["--corpus_data", QUERIES, "--query_data", CORPUS], f"hub:{CORPUS}", f"hub:{QUERIES}"),  # as they have it
        (["--corpus_data", f"{CORPUS}@v1", "--query_data", f"hub:{QUERIES}:x.json"], f"hub:{CORPUS}@v1",
         f"hub:{QUERIES}:x.json"),
    ],
)  # fmt: skip
def test_names_on_the_hub(words: list[str], corpus: str, queries: str) -> None:
    found = asked(parse("evaluate", FLAGS, "", words))
    assert (found.format, found.split, found.corpus, found.queries) == ("msmarco", "dev", corpus, queries)
    itself = "v1" not in corpus
    assert (found.n_passages, found.n_queries) == ((8_841_823, 6_980) if itself else (None, None))


def test_other_queries_of_msmarco_have_another_number() -> None:
    found = asked(parse("evaluate", FLAGS, "", ["--split", "train"]))
    assert (found.n_passages, found.n_queries) == (8_841_823, None)


def test_msmarco_itself_from_the_hub(model, tmp_path) -> None:
    write(tmp_path / "corpus/data/train.jsonl", [{"content": text} for text in TEXTS])
    write(tmp_path / "queries/dev.jsonl", questions())
    with running(tmp_path / "home") as hub:
        hub.add(CORPUS, "v1", tmp_path / "corpus")
        hub.add(QUERIES, "v1", tmp_path / "queries")
        words = ["--encoder", model, "--add_instruction", "--vector_dtype", "float32"]
        counted, half = ["--n_passages", str(len(TEXTS)), "--n_queries", str(N)], ["--n_passages", str(len(TEXTS))]
        done, less, other = (subprocess.run(
            [sys.executable, "-m", "retune", "evaluate", *words, *more], env=hub.environment, cwd=tmp_path,
            capture_output=True, text=True,
        ) for more in (counted, half, []))  # fmt: skip
    # MS MARCO itself has as many as the literature says, unless another number is asked for
    assert f"14 queries with a positive, but --n_queries says {N_QUERIES:,}: another version, or" in less.stderr
    assert f"60 passages, but --n_passages says {N_PASSAGES:,}: another version, or not" in other.stderr
    assert (less.returncode, other.returncode) == (1, 1)
    assert done.returncode == 0, done.stderr
    printed = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert printed == pytest.approx(by_loops(model, INSTRUCTION), abs=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "home", "queries"]
