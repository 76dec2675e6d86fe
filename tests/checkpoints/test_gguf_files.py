"""Check that a GGUF file gives what transformers gives, whatever else is in its folder."""

import contextlib
import errno
import re
import shutil

import gguf
import pytest
import torch
import transformers
from commands import SMALL, run
from makegguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mixgpt.app import generate
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError
from mixgpt.modeling.streaming import disk_weights

F16, Q4_1 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q4_1
TEXT = "Names refer to objects.\n\n  They are introduced by name binding operations; café."


@pytest.fixture
def path(tmp_path, checkpoint_folder, monkeypatch):
    """Give the path of a GGUF file, still to be written, in the folder of another model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(checkpoint_folder("opt"), tmp_path / "folder") / "tiny.gguf"


@pytest.mark.parametrize("kind, dtype, own", [
    (None, "auto", torch.float32), (F16, "auto", torch.float16), (Q4_1, "auto", torch.bfloat16),
    (Q4_1, torch.bfloat16, torch.bfloat16)])
def test_a_file_gives_what_transformers_gives_in_its_own_dtype_to_the_bit(dtype, own, kind, tokenizer, path):
    write_gguf(path, tokenizer, kind)
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=own,
                                                 quantization_config=GgufConfig(dequantize=True))
    model = load.open_model(path, load.read_config(path), dtype)
    assert model.dtype == plain.dtype
    ours = load.load_model(path, dtype)
    assert all(torch.equal(ours.get_parameter(name), weight) for name, weight in plain.named_parameters())
    theirs, ours = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), load.load_tokenizer(path)
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_a_file_is_pruned_and_continues_a_text(tokenizer, path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    write_gguf(path, tokenizer)
    assert run("llama.py", path, "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved") == 0
    assert load.read_config(tmp_path / "saved").model_type == "llama"
    assert generate.main("generate.py", [str(path), "the list", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert re.fullmatch(f"converted {path} into .* \\(once\\)\n", capsys.readouterr().err)


def test_a_file_is_converted_again_when_it_has_changed(tokenizer, path):
    heads = []
    for seed in (0, 0, 1):
        if len(heads) != 1:  # the second time it stays
            write_gguf(path, tokenizer, seed=seed)
        model = load.open_model(path, load.read_config(path), "auto")
        heads.append(load.load_model(path, "auto").lm_head.weight)
        assert disk_weights(model.model.layers[0])  # which only the cache makes possible
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_cannot_be_renamed_is_an_error_unless_another_process_has_made_it(made, tokenizer, path,
                                                                                        monkeypatch):
    def rename(partial, folder):
        if made:
            shutil.copytree(partial, folder)
        raise OSError(errno.EACCES, "Permission denied")

    write_gguf(path, tokenizer)
    monkeypatch.setattr(load.os, "rename", rename)
    with contextlib.nullcontext() if made else pytest.raises(InputError, match="cannot be converted into"):
        assert load.read_config(path).model_type == "llama"
