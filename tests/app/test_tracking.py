"""Run with the real W&B client, offline, and read back what it wrote."""

import json
import os
import struct
from pathlib import Path

import pytest
import yaml
from commands import run
from conftest import ROOT, load_compiled, read_little
from paper import METHODS, TABLES, TASKS
from scores import flags_of

from mixgpt.app import cli
from mixgpt.app.settings import Settings
from mixgpt.app.tracking import Tracker
from mixgpt.common.errors import InputError
from mixgpt.evaluation.measures import MatrixSparsity
from mixgpt.pruning.targets import Outcome

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2  # noqa: E402
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # noqa: E402

ARGUMENTS = ["--nsamples=4", "--seqlen=32", "--eval=builtin", "--device=cpu", "--sensitivity=fisher"]
SWEEP = yaml.safe_load((ROOT / "sweep.yaml").read_text())


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """Keep the client offline and away from the user's files; read little text."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(home))
        read_little(patch)
        load_compiled()
        wandb.teardown()  # a client that was begun before keeps the folders it was begun with
        yield home
        wandb.teardown()


def folder_of(home):
    """Return the folder of the latest run."""
    return (home / "wandb" / "latest-run").resolve()


def read_back(folder):
    """Return (config, history, summary, exit code, group) from the file of a run.

    It is a LevelDB log of protocol buffers: after 7 bytes of header, blocks of 32 KiB with parts of records, each part
    behind its checksum, length and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    wandb.teardown()  # the last records are on disk when the client's process has ended
    file, = folder.glob("*.wandb")
    data, at, held = file.read_bytes(), 7, b""
    config, history, summary, status, group = {}, [], {}, None, None
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record.FromString(held)
        held = b""
        config |= _values(record.run.config.update) | _values(record.config.update)
        history += [_values(record.history.item)] if record.HasField("history") else []
        summary |= _values(record.summary.update)
        status = record.exit.exit_code if record.HasField("exit") else status
        group = record.run.run_group or group
    return config, history, summary, status, group


def _values(items):
    return {" ".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def logged(surroundings, checkpoint_folder, tmp_path_factory):
    """Give (record, folder of W&B, what `read_back` finds there) of a run that logs."""
    record = tmp_path_factory.mktemp("record") / "new" / "run.json"
    assert run("opt", checkpoint_folder("opt"), "builtin", *ARGUMENTS, "--sparsity=.5", "--sparsity-way=weight-level",
               "--saliency=isc", "--wbits=4", "--dense", "--log-wandb", "--wandb-project=pruning", "--wandb-name=first",
               "--wandb-group=tiny", f"--record={record}") == 0
    folder = folder_of(surroundings)
    return json.loads(record.read_text()), folder, read_back(folder)


def test_what_is_logged_is_what_is_recorded(logged):
    record, folder, (config, history, summary, status, group) = logged
    method = "MixGPT (weight-level by fisher) + 4 bit"
    assert config.items() >= record["settings"].items() and record["settings"]["dtype"] == "float32"
    assert all(config[key] == record[key] for key in ("versions", "data", "device_name"))
    assert (config["method"], status, group) == (method, 0, "tiny")
    for found in (summary, history[-1]):
        assert found["perplexity/builtin"] == record["perplexity"][method]["builtin"]
        assert found["dense_perplexity/builtin"] == record["perplexity"]["dense"]["builtin"]
    assert summary["method"] == method and summary["sparsity"] == record["sparsity"]
    assert summary["seconds"] == record["seconds"] | {"total": pytest.approx(sum(record["seconds"].values()))}
    assert summary["peak_memory"] == record["peak_memory"]
    table = json.loads(next(folder.glob("files/media/table/matrices*.json")).read_text())
    for row, cells in zip(record["matrices"], table["data"], strict=True):
        assert dict(zip(table["columns"], cells, strict=True)) == {
            name: value for name, value in row.items() if name != "shape"}


def test_layers_are_logged_as_the_run_goes(logged):
    record, _, (_, history, *_) = logged
    layers = [point for point in history if "layer" in point]
    assert [point["layer"] for point in layers] == [0, 1, 2]
    for point in layers:
        rows = [row for row in record["matrices"] if row["layer"] == point["layer"]]
        sizes = [row["shape"][0] * row["shape"][1] for row in rows]
        assert point["layers/error"] == pytest.approx(sum(row["error"] for row in rows) / len(rows))
        assert point["layers/sparsity"] == pytest.approx(
            sum(row["sparsity"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes))
        for row in rows:
            name = row["name"].replace(".", "/")
            assert (point[f"error/{name}"], point[f"sparsity/{name}"]) == (row["error"], row["sparsity"])
    pruning = sum(record["seconds"][part] for part in ("forward", "Hessian", "factorisation", "walk"))
    assert 0.5 * pruning < sum(point["layers/seconds"] for point in layers) < sum(record["seconds"].values())
    assert layers[0]["_timestamp"] < layers[1]["_timestamp"] < layers[2]["_timestamp"]


def test_the_plan_is_a_table_and_a_picture(logged):
    record, folder, _ = logged
    content = json.loads(next(folder.glob("files/media/table/plan/*.json")).read_text())["data"]
    rows = {(row["layer"], row["name"]): row for row in record["matrices"]}
    assert [row[4] for row in content] == list(range(1, len(rows) + 1))
    assert content == sorted(content, key=lambda row: row[2], reverse=True)
    for layer, name, trace, error, _, sparsity in content:
        assert (trace, sparsity) == (rows[layer, name]["sensitivity"], rows[layer, name]["target"]) and error > 0
    assert next(folder.glob("files/media/images/plan/*.png")).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def variables(monkeypatch):
    """Give a MonkeyPatch for the variables that the client reads, which it does once."""
    wandb.teardown()
    yield monkeypatch
    monkeypatch.undo()
    wandb.teardown()


def commands_of(sweep):
    """Yield the arguments of all runs of a grid as the client's agent builds them, and their Settings, once checked."""
    runs = [{}]
    for name, values in sweep["parameters"].items():
        runs = [run | {name: value} for run in runs for value in values["values"]]
    for parameters in runs:
        made = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
        words = [made["args_no_boolean_flags"] if word == "${args_no_boolean_flags}" else [word]
                 for word in sweep["command"]]
        env, interpreter, program, *arguments = (word for group in words for word in group)
        assert (env, interpreter, program) == ("${env}", "${interpreter}", "${program}")
        settings = cli.parse(sweep["program"], arguments)
        assert all(getattr(settings, name) == value for name, value in parameters.items()) and settings.log_wandb
        yield arguments, settings


@pytest.mark.parametrize("file", sorted(ROOT.glob("sweeps/*.yaml")), ids=lambda file: file.stem)
def test_the_runs_of_a_papers_sweep_are_the_rows_of_its_table(file):
    sweep = yaml.safe_load(file.read_text())
    made = [settings for _, settings in commands_of(sweep)]
    assert {(settings.dataset, settings.sensitivity) for settings in made} == {("c4", "hutchinson")}
    assert {file.stem for file in ROOT.glob("sweeps/*.yaml")} == {*TABLES, "table4-gptq"}
    table = TABLES[file.stem.removesuffix("-gptq")]
    gptq = ("gptq" in file.stem) if file.stem.startswith("table4") else None
    rows = [cli.parse(sweep["program"], ["m", "c4", *METHODS[method].split(), *flags_of(target).split()])
            for method, target in table.rows if gptq in (None, method == "gptq")]

    def what(settings):
        return settings.method(), settings.sparsity, settings.gmp or settings.saliency

    assert set(map(what, rows)) <= set(map(what, made)) and len(made) <= 4 / 3 * len(rows)
    assert all(settings.tasks == (TASKS if table.flags else ()) for settings in made)


def test_runs_of_the_sweep_share_their_traces():
    made = [settings for _, settings in commands_of(SWEEP)]
    assert len(made) == 36 and {settings.sensitivity_file for settings in made} == {"traces-opt-125m.json"}


def begin():
    return Tracker(Settings("opt", "c4", log_wandb=True, quiet=True), {"settings": {"sparsity": 0.5}}, "dense")


@pytest.mark.parametrize("error, status", [(InputError("no luck\nat all"), 2), (KeyboardInterrupt(), 130)])
def test_a_run_that_fails_is_marked_so_and_says_why(error, status, surroundings):
    with pytest.raises(type(error)), begin():
        raise error
    _, _, summary, found, _ = read_back(folder_of(surroundings))
    assert (found, summary.get("failed")) == (status, "no luck at all" if status == 2 else None)


def test_a_run_that_the_caller_has_open_is_logged_to_and_stays_open(surroundings, variables):
    variables.setenv("WANDB_REINIT", "finish_previous")  # as it is by default in a notebook
    with wandb.init(config={"lr": 1}) as caller:
        with begin() as tracker:
            tracker.layer(0, [MatrixSparsity(0, "fc1", (2, 2), 4, 1)], {}, 0.0)
        caller.log({"mine": 1})
    config, history, _, status, _ = read_back(Path(caller.dir).parent)
    assert history[0]["sparsity/fc1"] == 0.25 and "layers/error" not in history[0]  # without calibration
    assert config.items() >= {"lr": 1, "sparsity": 0.5}.items() and (history[-1]["mine"], status) == (1, 0)


def test_logged_out_the_run_is_kept_on_disk_after_one_line(surroundings, variables, capfd):
    variables.delenv("WANDB_MODE")
    capfd.readouterr()
    with begin():
        folder = folder_of(surroundings)
    assert capfd.readouterr() == (f"warning  W&B: not online; upload the run with: wandb sync {folder}\n", "")
    assert read_back(folder)[3] == 0


@pytest.mark.parametrize("step", ["init", "log", "finish"])
def test_a_client_that_fails_is_left_after_one_line(step, capsys):
    def fail(*_, **__):
        raise BrokenPipeError("the service\nhas died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb if step == "init" else wandb.Run, step, fail)
        with begin() as tracker:
            for _ in range(2):
                tracker.layer(0, [MatrixSparsity(0, "fc1", (2, 2), 4, 1)], {(0, "fc1"): Outcome(0.1)}, 0.0)
            tracker.result({"matrices": [], "seconds": {}}, "dense")
    assert capsys.readouterr().out == "warning  W&B: the service has died; going on without it\n"
    wandb.finish()
