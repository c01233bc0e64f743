"""Tiny models with random weights, and tables for them, built in a test's own folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

FIRST, LAST = ("ba", "co", "di", "fu", "ge", "hi", "lo", "mu"), ("r", "st", "n", "lt", "p", "x", "m", "nd")
WORDS = [first + last for first in FIRST for last in LAST]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, saved in `folder`."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )  # fmt: skip
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def tiny_bert(folder: str | Path, seed: int = 0, dropout: float = 0.1, hidden: int = 32) -> Path:
    """A BERT of two layers with random weights and mean pooling, as sentence-transformers saves it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def tiny_reranker(folder: str | Path, seed: int = 0, kind: str = "bert", labels: int = 1) -> Path:
    """A sequence classifier of two layers: "bert" with segments, or "xlm-roberta" without, padded with id 1."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_labels": labels,
        "initializer_range": 0.3,
    }  # fmt: skip
    if kind == "bert":
        tiny_tokenizer(folder)
        config = BertConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=64, **sizes)
        model = BertForSequenceClassification
    else:
        _roberta_tokenizer(folder)
        config = XLMRobertaConfig(
            vocab_size=len(SPECIAL + WORDS), max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **sizes
        )
        model = XLMRobertaForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model(config).save_pretrained(folder)
    return folder


def tiny_m3(folder: str | Path, seed: int = 0, colbert_dim: int | None = None, **options) -> Path:
    """An XLM-R of two layers; with a `colbert_dim`, also M3's heads, in FlagEmbedding's files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _roberta_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = XLMRobertaConfig(
        vocab_size=len(SPECIAL + WORDS), max_position_embeddings=66, type_vocab_size=1, pad_token_id=1,
        initializer_range=0.2, **sizes | options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
        if colbert_dim:
            torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
            torch.save(torch.nn.Linear(32, colbert_dim).state_dict(), folder / "colbert_linear.pt")
    return folder


def _roberta_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that joins texts as XLM-R does: <s> A </s></s> B </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=["input_ids", "attention_mask"],
        cls_token="<s>", bos_token="<s>", sep_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip


def some_texts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    """`n` texts of 1 to `longest` of the tokenizers' words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(n)]


# ---- decoders -----------------------------------------------------------------------------------

DECODERS = {
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
}
MORE_DECODERS = {
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 1},
}
DECODER_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
QWEN_SPLIT = (  # how Qwen's tokenizer cuts text before it merges bytes; a line break may stick to what is before it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer(folder: str | Path, pad: str | None = "<pad>", bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen's rules, "Yes", "No", "yes", "no" and `?\\n` among its tokens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"{word} Yes No yes no?\nIs it {word}?\n" for word in WORDS] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    for word in ("Yes", "No", "yes", "no", "?\n"):
        assert len(tokenizer.encode(word).ids) == 1, word
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, pad_token=pad, bos_token="<bos>" if bos else None,
        eos_token="<eos>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def tiny_decoder(folder: str | Path, kind: str, seed: int = 0, labels: int | None = None, **options) -> Path:
    """A language model of four layers, of `DECODERS` or `MORE_DECODERS`; with `labels`, a sequence classifier."""
    fast = byte_tokenizer(folder)
    config = AutoConfig.for_model(
        kind, vocab_size=len(fast), pad_token_id=fast.pad_token_id, bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id, **DECODER_SIZES | (DECODERS | MORE_DECODERS)[kind] | options,
    )  # fmt: skip
    if labels is not None:
        config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
        auto.from_config(config).save_pretrained(folder)
    return Path(folder)
