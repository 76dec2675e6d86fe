"""Check the benchmark of generation with packed models, and its table."""

import json

import pytest
import serving
import tables


@pytest.mark.slow
def test_packed_models_take_turns_with_the_dense_one(checkpoint_folder, prune, tmp_path, capsys):
    dense, output = str(checkpoint_folder("wide llama")), tmp_path / "serving.json"
    prune("wide llama", f"--sparsity .5 --save {tmp_path / 'half'} --save-format sparse")
    prune("wide llama", f"--prunen 2 --prunem 4 --wbits 4 --save {tmp_path / 'codes'} --save-format sparse")
    for sequences in ("1", "3"):
        assert serving.main([dense, str(tmp_path / "half"), str(tmp_path / "codes"), "--output", str(output),
                             "--sequences", sequences, "--tokens", "4", "--rounds", "2"]) == 0
    cells = json.loads(output.read_text())["cells"]
    assert [(cell["target"], cell["sequences"]) for cell in cells] == [
        ("50%", 1), ("2:4 + 4 bit", 1), ("50%", 3), ("2:4 + 4 bit", 3)]
    for cell in cells:
        assert len(cell["ratios"]) == 2 and min(*cell["ratios"], *cell["rates"]) > 0
    (dense_bytes, half), (_, codes) = (cell["bytes"] for cell in cells[:2])
    assert codes < half < dense_bytes
    assert serving.main([dense, dense, "--output", str(output)]) == 2
    assert f"PACKED {dense}: is no folder of --save" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_number_of_sequences():
    cell = {"model": "models/a.gguf", "method": "vllm", "rates": [10.0, 14.0], "ratios": [1.5, 1.25, 1.4],
            "bytes": [2e6, 1e6]}
    cells = [cell | {"target": "50%", "sequences": 1}, cell | {"target": "70%", "sequences": 1, "bytes": [None, None]},
             cell | {"target": "50%", "sequences": 8}, cell | {"target": "50%", "sequences": 8, "rates": [10.0, 15.0]}]
    assert tables.servings(tables.latest(cells)).splitlines() == [
        "| model | engine | sequences | 50% | 70% |", "| --- | --- | --- | --- | --- |",
        "| a | vllm | 1 | 10.0 → 14.0, 1.40 (1.25 to 1.50), 1 of 2 MB | 10.0 → 14.0, 1.40 (1.25 to 1.50) |",
        "| a | vllm | 8 | 10.0 → 15.0, 1.40 (1.25 to 1.50), 1 of 2 MB |  |"]
