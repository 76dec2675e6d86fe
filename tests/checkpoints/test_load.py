"""Check loading."""

import contextlib
import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece as spm
import torch
from conftest import assert_same_weights, make, record_of
from faults import json_changed
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import LlamaConfig

from mixgpt import datautils
from mixgpt.checkpoints import load
from mixgpt.modeling import streaming
from mixgpt.modeling.streaming import locations_of


def test_the_empty_special_tokens_of_early_llama_conversions_are_put_right(tmp_path):
    text = "Names refer to objects."
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(datautils.load_rows("builtin", "train", None)[0][:150]), vocab_size=600, minloglevel=2,
        model_prefix=tmp_path / "tokenizer", model_type="bpe", byte_fallback=True, character_coverage=0.99)
    LlamaConfig(vocab_size=600, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}))
    tokenizer = load.load_tokenizer(tmp_path)
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert tokenizer(text).input_ids == [1, *pieces]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def put_in_cache(folder, cache):
    """Keep a folder as the hub's client keeps the model org/name: a snapshot is links to blobs without an ending."""
    blobs, refs, snapshot = (cache / "models--org--name" / path for path in ("blobs", "refs", "snapshots/5cf2"))
    for place in (blobs, refs, snapshot):
        place.mkdir(parents=True)
    (refs / "main").write_text(snapshot.name)
    for file in folder.iterdir():
        blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")


def pickle_weights(folder):
    """Replace safetensors files by .bin files, the tensors of each in one storage."""
    for file in folder.glob("model*.safetensors*"):
        name = "pytorch_" + file.name.replace(".safetensors", ".bin")
        if file.suffix == ".json":
            index = file.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (folder / name).write_text(index)
        else:
            state = load_file(file)
            storage = torch.cat([tensor.flatten() for tensor in state.values()])
            parts = storage.split([tensor.numel() for tensor in state.values()])
            torch.save({key: part.view_as(state[key]) for key, part in zip(state, parts, strict=True)}, folder / name)
        file.unlink()


@pytest.mark.parametrize("size, files, pickled", [("1GB", 1, False), ("40KB", 5, False), ("1GB", 1, True),
                                                  ("40KB", 5, True)])
def test_a_hub_id_is_read_from_the_cache_as_a_folder_is(size, files, pickled, tokenizer, prune, tmp_path, monkeypatch):
    """Without network, and its weights stay on disk, as in the README's first command."""
    model, source, saved = make("opt"), tmp_path / "source", tmp_path / "saved"
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(source, max_shard_size=size)
    tokenizer.save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) == files
    prune("opt", "--sparsity .5 --save", tmp_path / "expected", model=source)
    if pickled:
        pickle_weights(source)
    put_in_cache(source, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    prune("opt", "--sparsity .5 --save", saved, model="org/name")
    assert_same_weights(saved, tmp_path / "expected")
    record, expected = record_of(saved), record_of(tmp_path / "expected")
    assert all(record[key] == expected[key] for key in ("matrices", "perplexity", "data"))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_text() == (tmp_path / "expected" / name).read_text()
    assert locations_of(load.open_model("org/name", load.read_config("org/name"), "auto"))


def test_one_of_several_processes_converts_the_bin_files_that_all_read(checkpoint_folder, tmp_path, monkeypatch):
    """Threads are told apart by the lock as processes are."""
    pickle_weights(folder := shutil.copytree(checkpoint_folder("opt"), tmp_path / "model"))
    json_changed(folder / "config.json", dtype=None)  # so that it is that of the weights
    written, write = [], streaming.write
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "silenced", contextlib.nullcontext)  # which is for a whole process
    monkeypatch.setattr(streaming, "write", lambda *given: (written.append(given), time.sleep(1), write(*given)))
    with ThreadPoolExecutor(2) as pool:
        assert [config.dtype for config in pool.map(load.read_config, [folder] * 2)] == [torch.float32] * 2
    assert len(written) == 1
