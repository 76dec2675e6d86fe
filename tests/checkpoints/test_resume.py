"""Kill runs at moments all over them: --resume gives what a run gives that nobody killed, bit for bit."""

import json
import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import command
from kills import SMALL, check_goes_on, drawn, loaded, side_by_side, watch
from safetensors.torch import load_file

from mixgpt.checkpoints import shards

MIXED = ["--sparsity", ".5", "--sparsity_way", "weight-level", "--sensitivity", "fisher", "--saliency", "isc"]


@dataclass
class Scenario:
    """A command line that is killed at moments in these parts of it."""

    name: str  # in FAMILIES
    options: list
    parts: list  # sets of parts of a run, of which one moment each is drawn
    pickled: bool = False  # weights that cannot be left on disk
    shard: int = shards.LARGEST  # bytes


CALIBRATION = {"forward", "Hessian", "factorisation", "walk"}
SPARSEGPT = [{"forward"}, CALIBRATION, {"finish"}, {"half a file"}, {"complete"}, {"evaluation"}, {"end"}]
SCENARIOS = {
    "opt": Scenario("opt", ["--sparsity", ".5"], [{"load"}, *SPARSEGPT], shard=40_000),
    "opt, in memory": Scenario("opt", ["--sparsity", ".5", "--wbits", "4"], SPARSEGPT[1:5], pickled=True),
    "llama, best": Scenario("llama", ["--preset", "best", "--sparsity", ".5"],
                            [{"synthetic", "gradients", "allocation"}, {"kept"}, CALIBRATION | {"admm"}, {"finish"},
                             {"distillation"}, {"finish"}, {"complete"}]),
    "opt, magnitude": Scenario("opt", ["--sparsity", ".5", "--gmp", "--wbits", "3"], [{"finish"}, {"complete"}]),
    "llama, mixed": Scenario("llama", [*MIXED, "--wbits", "4"], [{"sensitivity"}, {"traces"}, {"traces"}, {"finish"}]),
    "bloom, sparse": Scenario("bloom", ["--sparsity", ".5", "--wbits", "4", "--no-true-sequential", "--save-format",
                                        "sparse"], SPARSEGPT[1:]),
    "baichuan-7b, packed": Scenario("baichuan-7b", ["--sparsity", ".5", "--wbits", "4", "--sym", "--act-order",
                                                    "--distill", "1", "--save-format", "compressed-tensors"],
                                    [{"finish"}, {"distillation"}, {"complete"}]),
}


@pytest.fixture
def launch(fork, checkpoint_folder, tmp_path, monkeypatch):
    """Return a function that starts a scenario's command line in a process, to be killed at a moment or not at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def source(scenario):
        kept = checkpoint_folder(scenario.name)
        if not scenario.pickled:
            return kept
        path = tmp_path / "pickled"
        if not path.exists():
            path.mkdir()
            for file in kept.iterdir():
                (path / file.name).write_bytes(file.read_bytes())
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
        return path

    def start(scenario, saved, fatal, *more):
        root = tmp_path / saved
        root.mkdir(exist_ok=True)
        arguments = [source(scenario), "builtin", *scenario.options, *SMALL, "--save", root / "saved", *more]
        if "--sensitivity" in scenario.options:
            arguments += ["--sensitivity_file", root / "traces.json"]
        return fork(command, scenario.name, arguments, root / "log", watch,
                    (fatal, root / "moments.json", root, scenario.shard))

    return start


@pytest.mark.parametrize("case", SCENARIOS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_files(case, launch, tmp_path):
    scenario, generator = SCENARIOS[case], random.Random(case)
    process = launch(scenario, "whole", 0)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole" / "log").read_text()
    passed = json.loads((tmp_path / "whole" / "moments.json").read_text())
    assert loaded(tmp_path / "whole" / "saved") is not None

    singly = drawn(passed, scenario.parts, generator)
    chains = [[fatal] for fatal in singly]
    started = passed.index("finish")  # killed again, where they have come further or not
    chains.append([generator.randrange(started, len(passed)) for _ in range(3)])
    side_by_side(check_goes_on(partial(launch, scenario, f"killed{number}"), tmp_path / f"killed{number}", kills,
                               tmp_path / "whole") for number, kills in enumerate(chains))


def test_enough_moments_in_every_part_of_a_run_are_tried():
    parts = [part for scenario in SCENARIOS.values() for part in scenario.parts]
    assert len(parts) >= 20
    assert {"opt", "llama", "bloom", "baichuan-7b"} == {scenario.name for scenario in SCENARIOS.values()}
    assert {"load", "sensitivity", "traces", "walk", "kept", "finish", "half a file", "complete",
            "evaluation", "end"} <= set().union(*parts)
