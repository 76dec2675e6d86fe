"""Check sealed files: each changed byte is noticed, unless what is read is the same."""

import pytest
import torch
from safetensors.torch import save_file

from mixgpt.checkpoints import sealed
from mixgpt.modeling.streaming import Place

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor([1, 2]),
           "c": torch.tensor([1.5], dtype=torch.bfloat16)}
CONTENT = {"a": [1, 0.1, None, True], "é": {"inf": float("inf")}}


@pytest.fixture
def files(tmp_path):
    """Give a sealed JSON file and a sealed safetensors file."""
    sealed.write_json(tmp_path / "a.json", CONTENT, "run")
    sealed.write_tensors(tmp_path / "a.safetensors", TENSORS, "run")
    return tmp_path / "a.json", tmp_path / "a.safetensors"


def same(found):
    return found.keys() == TENSORS.keys() and all(
        torch.equal(tensor, found[key]) and tensor.dtype == found[key].dtype for key, tensor in TENSORS.items())


def test_what_was_written_is_read(files):
    assert sealed.read_json(files[0], "run") == CONTENT
    assert same(sealed.read_tensors(files[1], "run"))


@pytest.mark.parametrize("bit", [0, 3, 6, 7])
def test_each_changed_bit_is_noticed_or_harmless(bit, files):
    for file, harmless in zip(files, (lambda file: sealed.read_json(file, "run") == CONTENT,
                                      lambda file: same(sealed.read_tensors(file, "run"))), strict=True):
        content, noticed = file.read_bytes(), 0
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:])
            try:
                assert harmless(file), place
            except sealed.Damaged as damage:
                assert str(damage) == file.name
                noticed += 1
        assert noticed > len(content) / 2
        file.write_bytes(content)


def test_a_file_that_is_cut_anywhere_is_noticed(files):
    for file, read in zip(files, (sealed.read_json, sealed.read_tensors), strict=True):
        content = file.read_bytes().rstrip(b"\n")
        for kept in range(len(content)):
            file.write_bytes(content[:kept])
            with pytest.raises(sealed.Damaged):
                read(file, "run")


def test_a_file_of_another_run_or_name_or_program_is_noticed(files):
    for file, read in zip(files, (sealed.read_json, sealed.read_tensors), strict=True):
        with pytest.raises(sealed.Damaged):
            read(file, "another run")
        moved = file.rename(file.with_name("b" + file.suffix))
        with pytest.raises(sealed.Damaged):
            read(moved, "run")
    save_file(TENSORS, files[1], metadata={"format": "pt"})
    with pytest.raises(sealed.Damaged):
        sealed.read_tensors(files[1], "run")


def test_tensors_are_held_against_checksums_from_elsewhere(files):
    sums = sealed.write_tensors(files[1], TENSORS, "run")
    places = {name: Place(files[1], name) for name in ("a", "b", "d")}
    sealed.check_tensors(places, {"a": sums["a"]})
    for wrong in ({"a": sums["b"]}, {"d": sums["a"]}):
        with pytest.raises(sealed.Damaged):
            sealed.check_tensors(places, wrong)
