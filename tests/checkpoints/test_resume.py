"""Kill runs at moments all over them: --resume gives what a run gives that nobody killed, bit for bit."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import as_rank, command, free_port
from kills import SMALL, check_goes_on, drawn, end_of, loaded, watch
from safetensors.torch import load_file

from mixgpt.checkpoints import formats

MIXED = ["--sparsity", ".5", "--sparsity-way", "weight-level", "--sensitivity", "fisher", "--saliency", "isc"]


@dataclass
class Scenario:
    """A command line that is killed at moments in these parts of it."""

    name: str  # in FAMILIES
    options: list
    parts: list  # sets of parts of a run, of which one moment each is drawn
    pickled: bool = False  # weights that cannot be left on disk
    shard: int = formats.LARGEST  # bytes
    processes: int = 1  # of which the first one is killed


CALIBRATION = {"forward", "Hessian", "factorisation", "walk"}
SPARSEGPT = [{"forward"}, CALIBRATION, {"finish"}, {"half a file"}, {"complete"}, {"publish"}, {"evaluation"}, {"end"}]
SCENARIOS = {
    "opt": Scenario("opt", ["--sparsity", ".5"], [{"load"}, *SPARSEGPT], shard=40_000),
    "opt, in memory": Scenario("opt", ["--sparsity", ".5", "--wbits", "4"], SPARSEGPT[1:3], pickled=True),
    "llama, best": Scenario("llama", ["--preset", "best", "--sparsity", ".5", "--wbits", "4", "--effort", "1.1"],
                            [{"gradients", "allocation"}, {"kept"}, CALIBRATION | {"admm"},
                             {"distillation"}, {"finish"}, {"finish"}]),
    "llama, mixed": Scenario("llama", [*MIXED, "--wbits", "4"], [{"sensitivity"}, {"traces"}, {"traces"}, {"finish"}]),
    "bloom, sparse": Scenario("bloom", ["--sparsity", ".5", "--wbits", "4", "--no-true-sequential", "--save-format",
                                        "sparse"], [{"finish"}, {"half a file"}, {"publish"}]),
    "baichuan-7b, packed": Scenario("baichuan-7b", ["--sparsity", ".5", "--wbits", "4", "--sym", "--act-order",
                                                    "--distill", "1", "--save-format", "compressed-tensors"],
                                    [{"finish"}, {"distillation"}, {"complete"}]),
    "llama, 2 processes": Scenario("llama", ["--preset", "best", "--sparsity", ".5"], [{"finish"}], processes=2),
}
KILLS = int(os.environ.get("KILLS", 0))  # at further moments of each scenario, by `make soak`


def member(rank, world, port, *watched):
    """Be one of the processes of a run, and let `watch` watch it."""
    os.environ["XDG_CACHE_HOME"] = "/dev/null"  # so that .bin files cannot be converted
    if world > 1:
        as_rank(rank, world, port)
    watch(*watched)


@pytest.fixture
def launch(fork, checkpoint_folder, tmp_path):
    """Return a function that runs a scenario's command line, to be killed at a moment or not, and gives its status."""
    def source(scenario):
        kept = checkpoint_folder(scenario.name)
        if not scenario.pickled:
            return kept
        path = tmp_path / "pickled"
        if not path.exists():
            shutil.copytree(kept, path, dirs_exist_ok=True)
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
        return path

    def run(scenario, saved, fatal, *more):
        root = tmp_path / saved
        root.mkdir(exist_ok=True)
        arguments = [source(scenario), "builtin", *scenario.options, *SMALL, "--save", root / "saved", *more]
        if "--sensitivity" in scenario.options:
            arguments += ["--sensitivity-file", root / "traces.json"]
        world, port = scenario.processes, free_port()
        return end_of([fork(command, scenario.name, arguments, root / f"log{rank or ''}", member, (
            rank, world, port, 0 if rank else fatal, root / f"moments{rank or ''}.json", root, scenario.shard))
            for rank in range(world)])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", SCENARIOS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_files(case, launch, tmp_path):
    scenario, generator = SCENARIOS[case], random.Random(case)
    assert launch(scenario, "whole", 0) == 0, (tmp_path / "whole" / "log").read_text()
    passed = json.loads((tmp_path / "whole" / "moments.json").read_text())
    assert loaded(tmp_path / "whole" / "saved") is not None

    chains = [[fatal] for fatal in drawn(passed, scenario.parts, generator)]
    started = passed.index("finish")  # killed again, where they have come further or not
    chains.append([generator.randrange(started, len(passed)) for _ in range(3)])
    chains += [[fatal] for fatal in generator.sample(range(1, len(passed) + 1), min(KILLS, len(passed)))]
    for number, kills in enumerate(chains):
        check_goes_on(partial(launch, scenario, f"killed{number}"), tmp_path / f"killed{number}", kills,
                      tmp_path / "whole")
