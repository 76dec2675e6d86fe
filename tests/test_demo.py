"""Run the notebook from top to bottom on a tiny model, and look at the outputs it is committed with."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

RUNS = ["dense", "magnitude 50%", "magnitude 60%", "SparseGPT 50%", "SparseGPT 60%", "MixGPT 50%", "MixGPT 60%",
        "best 50%", "MixGPT 50% + 4 bit"]


def outputs(demo, kind):
    """Return what was printed ("text"), or the base64 of pictures ("image"), in order."""
    found = [output for cell in demo.cells for output in cell.get("outputs", ())]
    if kind == "text":
        return [output.text for output in found if output.output_type == "stream"]
    return [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]


def check(demo):
    """Check that every code cell has run, and that tables, pictures and text are there."""
    cells = [cell for cell in demo.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    said = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert all(re.search(r"\d+/\d+ \[\d\d:\d\d", text) for text in said if text.strip())  # bars
    text = "\n".join(outputs(demo, "text"))
    totals = [float(total) for total in re.findall(r"^total .* (\d+\.\d+)%$", text, re.MULTILINE)]
    assert totals == pytest.approx([50, 60, 50, 60, 50, 60, 50, 50], abs=0.2)  # 4 bits round some weights more to 0
    assert len(re.findall(r"^plan     [56]0\.00% of the weights in all$", text, re.MULTILINE)) == 3
    assert len(re.findall(r"^perplexity ", text, re.MULTILINE)) == len(RUNS)
    assert len(outputs(demo, "image")) == 3
    written = re.findall(r"^dense +\| (.+), perplexity (\d+\.\d\d) on code$", text, re.MULTILINE)
    assert [name for name, _ in written] == [name for name in RUNS[1:] if "60%" not in name]
    for name, perplexity in written:
        assert re.search(rf" {perplexity}$", text, re.MULTILINE), name  # measured by a run above


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(checkpoint_folder, texts, tmp_path, monkeypatch):
    demo = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    at = next(index for index, cell in enumerate(demo.cells) if "parameters" in cell.metadata.get("tags", ()))
    given = {"MODEL": str(checkpoint_folder("opt")), "DATASET": "wikitext2", "OTHER": "code", "DATA_DIR": str(texts),
             "NSAMPLES": 4, "SEQLEN": 32, "EVAL_LIMIT": 4, "OUT": str(tmp_path / "demo"), "PROMPT": "The sheep",
             "NEW_TOKENS": 4}
    names = re.findall(r"^([A-Z_]+)(?:, ([A-Z_]+))? =", demo.cells[at].source, re.MULTILINE)
    assert {name for pair in names for name in pair if name} == set(given)
    demo.cells[at].source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    demo.cells[1].source, _, rest = demo.cells[1].source.partition("pip = ")  # what it installs is here
    assert "requirements.txt" in rest
    demo.cells[1].source += rest.partition("\n\n")[2]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of which a tiny model has no use for more
    NotebookClient(demo, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    check(demo)


def test_the_notebook_is_committed_with_the_outputs_of_a_real_run():
    demo = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    check(demo)
    assert not [output for cell in demo.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
    assert re.search("parameters, (b?)float(32|16), on cpu", outputs(demo, "text")[1])
    assert not re.search("/(tmp|root|home)/", "".join(outputs(demo, "text")))  # folders of the machine it ran on
    assert (ROOT / "demo.ipynb").stat().st_size < 1_000_000
