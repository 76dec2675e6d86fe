"""Damaged .gguf files."""

import dataclasses

import gguf
import torch
from makegguf import write_gguf
from transformers import PreTrainedTokenizerFast

from faults.damage import Fault, cut

MODEL = "model {root}/a.gguf: "
COMMAND = "{root}/a.gguf builtin --sparsity .5 --eval builtin"
UNREAD, NO_TOKENIZER = "the file cannot be read: ", "its tokenizer cannot be read: "
TEXT = f"{UNREAD}the text in its header is not UTF-8"
LARGE = "more than its files of 0.000131 GB can hold; they may be incomplete"


def written(root, **options):
    write_gguf(root / "a.gguf", PreTrainedTokenizerFast.from_pretrained(root / "model"), **options)


def metadata(message, change):
    """A file whose metadata, {key: gguf.GGUFValue}, are changed."""
    return Fault(lambda root: written(root, header=change), f"{MODEL}{message}", COMMAND)


def entry(message, key, value, kind=gguf.GGUFValueType.UINT64):
    return metadata(message, lambda entries: entries.update({key: gguf.GGUFValue(value, kind)}))


def lacking(message, key):
    return metadata(message, lambda entries: entries.pop(key))


def item(message, key, value):
    """One of a list of texts is another one."""
    def change(entries):
        texts = list(entries[key].value)
        texts[5] = value
        entries[key] = dataclasses.replace(entries[key], value=texts, sub_type=gguf.GGUFValueType.STRING)

    return metadata(message, change)


def weights(message, change):
    return Fault(lambda root: written(root, change=change), f"{MODEL}{message}", COMMAND)


def content(message, change):
    """A file whose bytes are changed."""
    return Fault(lambda root: (written(root), change(root / "a.gguf")), f"{MODEL}{message}", COMMAND)


def overwritten(file, at, value):
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + value + whole[at + len(value):])


def first_token(file):
    """Where the length of the first token is: after the name of the list, two types and the number of tokens."""
    key = b"tokenizer.ggml.tokens"
    return file.read_bytes().index(key) + len(key) + 4 + 4 + 8


HEADS = "llama.attention.head_count"

FAULTS = {
    "gguf: junk": Fault(
        lambda root: (root / "a.gguf").write_bytes(b"GGUFjunk"),
        f"{MODEL}{UNREAD}… (actual buffer size is 8)", COMMAND),
    "gguf: empty": Fault(
        lambda root: (root / "a.gguf").touch(), f"{MODEL}{UNREAD}cannot mmap an empty file", COMMAND),
    "gguf: another file": content(f"{UNREAD}… does not start with the GGUF magic bytes, …",
                                  lambda file: overwritten(file, 0, b"GGML")),
    "gguf: another version": content(f"{UNREAD}… is GGUF v9; …", lambda file: overwritten(file, 4, b"\x09")),
    "gguf: too many tensors": content(TEXT, lambda file: overwritten(file, 8, bytes(5) + b"\x01")),
    "gguf: too many entries": content(TEXT, lambda file: overwritten(file, 16, bytes(5) + b"\x01")),
    "gguf: a key longer than the file": content(TEXT, lambda file: overwritten(file, 24, b"\xff" * 8)),
    "gguf: a token longer than memory": content(
        f"{UNREAD}OverflowError …", lambda file: overwritten(file, first_token(file), b"\xff" * 8)),
    "gguf: cut in the header": content(f"{UNREAD}… (actual buffer size is 999)", lambda file: cut(file, 999)),
    "gguf: cut in the weights": content(f"{UNREAD}When changing to a larger dtype, …", lambda file: cut(file, -999)),
    "gguf: no architecture": lacking(f"{UNREAD}… has no `general.architecture` …", "general.architecture"),
    "gguf: an unknown architecture": entry(
        f"{UNREAD}GGUF model with architecture other …", "general.architecture", "other", gguf.GGUFValueType.STRING),
    "gguf: an architecture that is a number": entry(f"{UNREAD}TypeError …", "general.architecture", 3),
    "gguf: no number of blocks": lacking("its header has no block_count", "llama.block_count"),
    "gguf: no blocks": entry(
        "its configuration has num_hidden_layers 0, must be at least 1", "llama.block_count", 0),
    "gguf: absurdly many blocks": entry(
        f"its configuration asks for 1.02e+16 weights in 1099511627776 layers, {LARGE}", "llama.block_count", 2**40),
    "gguf: no heads": entry("its configuration has num_attention_heads 0, must be at least 1", HEADS, 0),
    "gguf: no number of heads": lacking("its header has no attention.head_count", HEADS),
    "gguf: no key-value heads": entry(
        "its configuration has num_key_value_heads 0, must be at least 1", f"{HEADS}_kv", 0),
    "gguf: no width": lacking("its header has no embedding_length", "llama.embedding_length"),
    "gguf: a width of text": entry(
        f"{UNREAD}… 'hidden_size' expected int, got str …", "llama.embedding_length", "x", gguf.GGUFValueType.STRING),
    "gguf: an absurd width": entry(
        f"its configuration asks for 6.01e+10 weights in 2 layers, {LARGE}", "llama.embedding_length", 100_000),
    "gguf: an absurd intermediate size": entry(
        f"its configuration asks for 2.11e+14 weights in 2 layers, {LARGE}", "llama.feed_forward_length", 2**40),
    "gguf: one position only": entry(
        "its configuration has max_position_embeddings 1, must be at least 2", "llama.context_length", 1),
    "gguf: a token that is no text": item(TEXT, "tokenizer.ggml.tokens", b"\xff\xfe"),
    "gguf: no tokens": lacking(f"{NO_TOKENIZER}KeyError 'tokens'", "tokenizer.ggml.tokens"),
    "gguf: an unknown tokenizer": entry(
        f"{NO_TOKENIZER}Cannot build a tokenizer from a GGUF file stating tokenizer 'other'. …",
        "tokenizer.ggml.model", "other", gguf.GGUFValueType.STRING),
    "gguf: a merge of an unknown token": item(
        f"{NO_TOKENIZER}Error while initializing BPE: Token `zz` out of vocabulary", "tokenizer.ggml.merges", "zz qq"),
    "gguf: a merge of one token": item(f"{NO_TOKENIZER}TypeError …", "tokenizer.ggml.merges", "zzqq"),
    "gguf: NaN": weights(
        "model.norm.weight contains NaN or inf", lambda state: state["model.norm.weight"].fill_(float("nan"))),
    "gguf: a weight of another shape": weights(
        "model.norm.weight is (33,), its configuration expects (32,)",
        lambda state: state.update({"model.norm.weight": torch.ones(33)})),
    "gguf: a weight is missing": weights(
        "the checkpoint lacks model.norm.weight", lambda state: state.pop("model.norm.weight")),
}
