"""Check that a GGUF file is read once, and is a folder from then on that gives the same, whole or not there."""

import functools
import hashlib
import os
import time

import gguf
import pytest
import torch
from commands import SMALL, run
from makegguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import generate
import llama
from mixgpt.checkpoints import gguf_files, load
from mixgpt.modeling import streaming

Q4_1 = gguf.GGMLQuantizationType.Q4_1
TEXT = "Names refer to objects.\n\n  They are introduced by name binding operations; café."


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Keep what is converted out of the user's cache. Gives its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mixgpt"


def plain(path, dtype):
    """Load a GGUF file with plain transformers. Returns (model, tokenizer)."""
    arguments = {"gguf_file": path.name}
    return (AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **arguments,
                                                 quantization_config=GgufConfig(dequantize=True)),
            AutoTokenizer.from_pretrained(path.parent, **arguments))


def converted(cache):
    """Return the folders in the cache, whole or not."""
    return sorted(file.name for file in cache.glob("*") if file.is_dir())


def opened(path, dtype="auto"):
    return load.open_model(path, load.load_config(path, llama.FAMILY), llama.FAMILY, dtype)


def the_line(capsys, beginning):
    """Return the one line on stderr, which must begin so."""
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(beginning), line
    return line


@pytest.mark.parametrize("kind, dtype", [(None, "auto"), (Q4_1, "auto"), (Q4_1, torch.bfloat16)])
def test_a_converted_file_gives_what_transformers_gives_to_the_bit_and_stays_on_disk(dtype, kind, tokenizer, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer, kind)
    model, its_tokenizer = plain(path, dtype)
    streamed = opened(path, dtype)
    assert all(parameter.is_meta for parameter in streamed.parameters()) and streamed.dtype == model.dtype
    whole = load.load_model(path, dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(streamed.disk_weights.tensor(name), parameter), name
        assert torch.equal(whole.get_parameter(name), parameter), name
    assert streaming.fingerprint(streamed) == streaming.fingerprint(model)
    for each in (streamed, whole):
        assert each.generation_config.to_dict() == model.generation_config.to_dict()
        ours, theirs = each.config.to_dict(), model.config.to_dict()
        assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= {"architectures", "_name_or_path"}
    mine = load.load_tokenizer(path)
    assert mine(TEXT).input_ids == its_tokenizer(TEXT).input_ids
    assert mine.special_tokens_map == its_tokenizer.special_tokens_map
    assert mine.decode(mine(TEXT).input_ids) == its_tokenizer.decode(mine(TEXT).input_ids)


def test_a_file_is_read_once_and_its_checksum_computed_once_a_process(tokenizer, cache, tmp_path, monkeypatch, capsys):
    path, reads, checksums = tmp_path / "tiny.gguf", [], []
    write_gguf(path, tokenizer)
    reader, digest = gguf.GGUFReader, hashlib.file_digest
    monkeypatch.setattr(gguf, "GGUFReader", lambda *given: reads.append(given) or reader(*given))
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: checksums.append(given) or digest(*given))
    load.load_config(path, llama.FAMILY)
    reads_at_first = len(reads)
    assert "converted" in the_line(capsys, "converted")
    assert run(llama.FAMILY, path, "builtin", "--sparsity", ".5", *SMALL) == 0
    assert generate.main([str(path), "the list", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert len(checksums) == len(converted(cache)) == 1
    gguf_files._folder_of.cache_clear()  # as in another process
    opened(path)
    assert len(reads) == reads_at_first and len(checksums) == 2
    assert capsys.readouterr().err == ""


def test_a_folder_belongs_to_the_content_of_a_file(tokenizer, cache, tmp_path):
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    write_gguf(one, tokenizer)
    first = opened(one).disk_weights.tensor("model.norm.weight"), converted(cache)
    two.write_bytes(one.read_bytes())
    opened(two)
    assert converted(cache) == first[1]
    model = write_gguf(one, tokenizer, change=lambda state: state["model.norm.weight"].mul_(2))
    assert torch.equal(opened(one).disk_weights.tensor("model.norm.weight"), model.model.norm.weight)
    assert not torch.equal(first[0], model.model.norm.weight) and len(converted(cache)) == 2
    assert torch.equal(opened(two).disk_weights.tensor("model.norm.weight"), first[0])


# ---- several processes, kills, disks ----------------------------------------------------------------------------


def converting(path, cache, report, prepare=None):
    """Open a GGUF file and report the sum of its weights, for `fork`. prepare: called before."""
    os.environ["XDG_CACHE_HOME"] = str(cache.parent)
    if prepare:
        prepare()
    model = opened(path)
    weights = (model.disk_weights.tensor(name) for name, _ in model.named_parameters())
    report.write_text(str(sum(weight.double().sum().item() for weight in weights)))


def slow(started):
    """Wait in the middle of a conversion, and tell of it."""
    write = gguf_files._write

    def waiting(folder, *given):
        with started.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1)
        write(folder, *given)

    gguf_files._write = waiting


def test_of_processes_that_come_at_once_one_converts_and_the_others_wait(fork, tokenizer, cache, tmp_path):
    path, started = tmp_path / "tiny.gguf", tmp_path / "started"
    write_gguf(path, tokenizer)
    processes = [fork(converting, path, cache, tmp_path / f"report{number}", functools.partial(slow, started))
                 for number in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(started.read_text().splitlines()) == len(converted(cache)) == 1
    assert len({(tmp_path / f"report{number}").read_text() for number in range(2)}) == 1


def test_what_a_kill_has_left_is_not_taken_for_whole(tokenizer, cache, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer)
    opened(path)
    name, = converted(cache)
    (cache / name).rename(cache / f"{name}.partial")
    (cache / f"{name}.partial" / "model.safetensors").write_bytes(b"half")
    gguf_files._folder_of.cache_clear()  # as in another process
    weight = opened(path).disk_weights.tensor("model.norm.weight")
    assert converted(cache) == [name]
    assert torch.equal(weight, plain(path, "auto")[0].model.norm.weight)


@pytest.mark.parametrize("reason", ["no cache", "full"])
def test_a_cache_without_room_is_one_line_and_nothing_is_left(reason, tokenizer, cache, tmp_path, capsys, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer)
    if reason == "no cache":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    else:
        monkeypatch.setattr(streaming, "save_file", full)
    assert run(llama.FAMILY, path, "builtin", *SMALL) == 2
    line = the_line(capsys, f"llama.py: error: model {path}: cannot be converted into ")
    assert line.endswith("); set XDG_CACHE_HOME to a folder with room")
    assert converted(cache) == []


def full(*_, **__):
    raise OSError(28, "No space left on device")
