"""Check the file of traces, read, gone on with or refused, and the statistics of its samples."""

import json

import pytest
import torch
from conftest import CPU, make

from mixgpt.allocation import traces
from mixgpt.common.errors import InputError
from mixgpt.modeling.running import StreamedModel


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traces.json"


def obtain(name, tokens, path, estimator="fisher", batch_size=2, **changes):
    model = make(name)
    return traces.load_or_compute(StreamedModel(model, CPU, batch_size), tokens, estimator, **changes, path=path)


def test_a_file_is_written_and_read_instead_of_computed(tokens, path, monkeypatch):
    first, where = obtain("llama", tokens, path)
    assert where == path and [file.name for file in path.parent.iterdir()] == ["traces.json"]
    monkeypatch.setattr(traces, "hessian_traces", lambda *_, **__: pytest.fail("computed again"))
    again, _ = obtain("llama", tokens, path)
    assert torch.equal(first.samples, again.samples) and first.shapes == again.shapes
    rows = json.loads(path.read_text())["matrices"]
    assert [row["trace"] for row in rows] == first.samples.mean(dim=0).tolist()
    assert [(row["layer"], row["name"]) for row in rows] == list(first.shapes)
    stored = traces.read(path, first.shapes, "fisher")
    monkeypatch.setattr(traces.distributed, "broadcast_object", lambda _: stored)  # by a process on another machine
    assert torch.equal(obtain("llama", tokens, path.with_name("none"))[0].samples, first.samples)


def test_by_default_the_file_depends_on_all_that_the_traces_depend_on(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [obtain("llama", tokens, None)[1]]
    for changes in ({"seed": 1}, {"nprobes": 2}, {"estimator": "hutchinson"}, {"name": "mistral"},
                    {"tokens": tokens[:4]}):
        places.append(obtain(**{"name": "llama", "tokens": tokens, "path": None} | changes)[1])
    assert len(set(places)) == 6 and {place.parent for place in places} == {tmp_path / "mixgpt"}
    assert obtain("llama", tokens, None, batch_size=3)[1] == places[0]
    # an estimator may have been put right since; a file that the user names counts all the same
    monkeypatch.setattr(traces.program, "commit", lambda: "another")
    assert obtain("llama", tokens, None)[1] not in places
    monkeypatch.setattr(traces, "hessian_traces", lambda *_, **__: pytest.fail("computed again"))
    assert obtain("llama", tokens, places[0])[1] == places[0]


def test_traces_that_are_not_finite_are_refused_and_not_kept(tokens, path):
    model = make("opt")
    model.model.decoder.layers[1].fc1.bias.data[0] = float("inf")
    with pytest.raises(InputError, match="layer 0 self_attn.k_proj: its trace is NaN or inf"):
        traces.load_or_compute(StreamedModel(model, CPU, 2), tokens, "fisher", path=path)
    assert not path.exists()


@pytest.mark.parametrize("samples, message", [
    (lambda rows: rows[:2], "is incomplete and was started with different data or settings"),
    (lambda rows: [[float("nan")] * len(row) for row in rows], "is not a file of traces: ")])
def test_an_incomplete_file_of_other_settings_or_one_with_nan_is_refused(samples, message, tokens, path):
    obtain("llama", tokens, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"samples": samples(content["samples"])}))
    with pytest.raises(InputError, match=message):
        obtain("llama", tokens, path, seed=1)


@pytest.mark.parametrize("name, estimator, message", [
    ("opt", "fisher", r"layer 0 self_attn.k_proj is \(16, 32\) there, \(32, 32\) in the model"),
    ("bloom", "fisher", r"layer 0 self_attention.query_key_value is missing there, \(96, 32\) in the model"),
    ("mistral", "fisher", "was computed from different weights"),
    ("llama", "hutchinson", "contains fisher traces; give --sensitivity fisher"),
])
def test_a_file_that_does_not_fit_is_refused_by_name(name, estimator, message, tokens, path):
    obtain("llama", tokens, path)
    with pytest.raises(InputError, match=f"--sensitivity-file {path}: .*{message}"):
        obtain(name, tokens, path, estimator)


def test_statistics_are_those_of_the_textbook():
    samples = torch.tensor([[1, 20, 4], [3, 10, 6], [2, 30, 2], [4, 12, 9]], dtype=torch.float64)
    found = traces.Traces("fisher", {(0, "a"): (1, 2), (0, "b"): (2, 5), (1, "a"): (2, 1)}, samples)
    assert found.sensitivity == {(0, "a"): 1.25, (0, "b"): 1.8, (1, "a"): 2.625}
    # a: deviations −1.5, .5, −.5, 1.5 of variance 5/3
    assert found.standard_error[0].item() == pytest.approx((5 / 3) ** 0.5 / 2)
    # per weight, even sequences: .75, 2.5, 1.5 → ranks 0, 2, 1; odd: 1.75, 1.1, 3.75 → ranks 1, 0, 2: Σd² = 6
    assert found.split_half_correlation == pytest.approx(1 - 6 * 6 / (3 * 8))


@pytest.mark.parametrize("estimator, advice", [
    ("hutchinson", "raise --nsamples or --nprobes, or take --sensitivity fisher"),
    ("fisher", "raise --nsamples or --nprobes"),
])
def test_an_unstable_ranking_is_warned_of_and_a_stable_one_is_not(estimator, advice):
    shapes = {(index, "a"): (1, 1) for index in range(20)}
    noise = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    warning = traces.Traces(estimator, shapes, noise).warning()
    assert warning.endswith(advice) and warning.startswith("warning  the ranking is not stable")
    assert not traces.Traces(estimator, shapes, 0.01 * noise + torch.arange(20)).warning()
    assert traces.Traces(estimator, shapes, noise[:1]).warning()
