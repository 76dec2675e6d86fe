"""Files of finished layers, which a thread writes while the next layer is pruned.

    layer-00000.safetensors, .json       a finished layer with the grids of its matrices, and their errors; it counts
                                         once the second file is there
    distilled-00000.safetensors, .json   the same layer, distilled; counts once distilled.json is there
    state-00001-RANK.safetensors         the hidden states before a layer; those of the latest layer that all processes
                                         have written count

All are written under another name, flushed and renamed, so that what a kill leaves goes on to the same bits.
"""

import contextlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mixgpt.checkpoints.shards import size
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.files import os_errors, replacing
from mixgpt.modeling import streaming
from mixgpt.modeling.streaming import Place
from mixgpt.pruning.targets import Outcome
from quant import Grid, Scheme

STATES_EVERY = 10  # hidden states are written when that takes less than a tenth of the time since the last write
UNREADABLE = (OSError, ValueError, SafetensorError)


class LayerFiles:
    """Finished layers in a folder; the model reads them from there if its weights are on disk.

    One layer is written at a time: `finish` waits for the one before, and raises what kept that from being written.
    As a context manager it waits for the thread, so that the folder can be removed.
    """

    def __init__(self, folder, place, advice, keeps_states=True):
        """folder: exists. place, advice: flag and path, and what to do, for errors. keeps_states: hidden states, too.
        """
        self.folder, self.place, self.advice, self.keeps_states = Path(folder), place, advice, keeps_states
        self.writes = distributed.rank() == 0
        self.thread, self.writing = ThreadPoolExecutor(1), None
        self.states_written, self.states_cost = time.monotonic(), 0.0  # when, and the seconds that it took
        self.border = None  # number of the layer behind the hidden states that this process has written last

    def __enter__(self):
        return self

    def __exit__(self, _, error, trace):
        self.thread.shutdown()
        if error is None:
            self._wait()

    def start(self, model, family):
        """Take the layers of a model."""
        self.model, self.family, self.layers = model, family, family.layers_of(model)
        self.sources = [hasattr(layer, "source") and dict(layer.source.places) for layer in self.layers]

    def begin(self, count, states=None):
        """Restore the model, and the calibration hidden states, to where the run was interrupted.

        count: number of layers to process, from the first. states: {name: hidden states}, overwritten. Returns the
        first unfinished layer, and the outcomes of those before.
        """
        self._wait()
        for index, places in enumerate(self.sources):  # those of the dense model, not what this process has pruned
            if places:
                self._point(index, places)
        finished = []
        while len(finished) < count and (outcomes := self._outcomes(len(finished))) is not None:
            finished.append(outcomes)
        first = len(finished)
        if states is not None and first < count:
            first = self._restore(first, states)
            if first < len(finished) and self.keeps_states:
                print(f"resume   of {len(finished)} finished layers, going on from layer {first}: no later hidden "
                      "states are kept", flush=True)
        for index in range(first):
            self._take(index)
        return first, {key: outcome for outcomes in finished[:first] for key, outcome in outcomes.items()}

    def _outcomes(self, index):
        """Return {(layer, name): Outcome} of a finished layer, None if there is none, or it cannot be read."""
        file, outcomes = self._layer(index), {}
        if not file.exists() or not file.with_suffix(".json").exists():
            return None
        try:
            with safe_open(file, "pt") as tensors:
                for name, matrix in json.loads(file.with_suffix(".json").read_text()).items():
                    grid = matrix["scheme"] and Grid(Scheme(**matrix["scheme"]), *(
                        tensors.get_tensor(f"grid.{name}.{part}").clone() for part in ("scale", "zero", "group")))
                    outcomes[index, name] = Outcome(matrix["error"], matrix["percdamp"], grid)
        except UNREADABLE as error:
            print(f"resume   {file} cannot be read ({error}): pruning again from layer {index}", flush=True)
            return None
        return outcomes

    def _restore(self, finished, states):
        """Overwrite the hidden states by the latest that all processes have. Returns before which layer they are."""
        files = {}
        for file in self.folder.glob(f"state-*-{distributed.rank()}.safetensors"):
            with contextlib.suppress(*UNREADABLE), safe_open(file, "pt"):
                files[int(file.name.split("-")[1])] = file
        common = set.intersection(*distributed.all_gather_object(set(files)))
        border = max((border for border in common if border <= finished), default=0)
        for name, tensor in load_file(files[border]).items() if border else ():
            states[name].copy_(tensor)
        return border

    def finish(self, index, layer, outcomes, states=None, kind="layer"):
        """Let the thread write a finished layer, {(layer, name): Outcome}, and at times the hidden states behind it.

        The layer is on the device. Hidden states that the next layer would change meanwhile are waited for. kind:
        "distilled" for a layer that does not count before `settle_distilled`.
        """
        self._wait()
        due = states is not None and self.keeps_states and distributed.broadcast_object(
            time.monotonic() - self.states_written >= STATES_EVERY * self.states_cost)
        copies = {name: tensor.to("cpu") for name, tensor in states.items()} if due else {}
        weights = streaming.leaving({f"{self.family.layers}.{index}.{name}": tensor
                                     for name, tensor in layer.state_dict().items()}) if self.writes else None
        self.writing = self.thread.submit(self._keep, self._layer(index, kind), weights, outcomes, index + 1, copies)
        if any(copies[name] is states[name] for name in copies):
            self._wait()
        if kind == "layer" and hasattr(layer, "source"):
            self._take(index)

    def _keep(self, file, weights, outcomes, border, states):
        """Write a layer, then the outcomes that make it count, then the hidden states behind it, if any."""
        if self.writes:
            grids = {f"grid.{name}.{part}": getattr(outcome.grid, part) for (_, name), outcome in outcomes.items()
                     if outcome.grid for part in ("scale", "zero", "group")}
            self.write(file.name, weights() | grids)
            self.write_json(file.with_suffix(".json").name, {
                name: {"error": outcome.error, "percdamp": outcome.percdamp,
                       "scheme": outcome.grid and asdict(outcome.grid.scheme)}
                for (_, name), outcome in outcomes.items()})
        if states:
            start = time.monotonic()
            self.write(f"state-{border:05d}-{distributed.rank()}.safetensors", states)
            self.states_written, self.border = time.monotonic(), border
            self.states_cost = self.states_written - start
        latest = set(self.folder.glob(f"state-{self.border or 0:05d}-*.safetensors"))
        if self.writes and len(latest) == distributed.world():
            for file in set(self.folder.glob("state-*.safetensors")) - latest:
                file.unlink()

    def settle(self):
        """Wait until all is written that was finished; the model reads it from there. Raises what prevented it."""
        self._wait()
        distributed.barrier()  # the first process writes, all read

    def settle_distilled(self, result):
        """Let the distilled layers, once all are written, take the place of the pruned ones. result: JSON-able."""
        self.settle()
        if self.writes:
            self.write_json("distilled.json", result)
        distributed.barrier()
        for index, layer in enumerate(self.layers):
            if self._layer(index) != self._layer(index, "layer"):
                if hasattr(layer, "source"):
                    self._take(index)
                if self.writes:
                    self._layer(index, "layer").unlink(missing_ok=True)

    def keep_undistilled(self, reason):
        """Let the pruned layers count for good. reason: why they are not distilled."""
        if self.writes:
            for file in self.folder.glob("distilled-*"):
                file.unlink()
            self.write_json("distilled.json", reason)

    @property
    def distilled(self):
        """The result of distillation once all distilled layers are written, or why there are none; None before."""
        file = self.folder / "distilled.json"
        return json.loads(file.read_text()) if file.exists() else None

    def _wait(self):
        """Wait for the thread. Raises what ended its work."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _layer(self, index, kind=None):
        """Return the file of a layer, pruned ("layer") or "distilled"; by default the one that counts."""
        distilled = self.folder / f"distilled-{index:05d}.safetensors"
        if kind == "distilled" or kind is None and self.distilled and distilled.exists():
            return distilled
        return self.folder / f"layer-{index:05d}.safetensors"

    def _take(self, index):
        """Let the model have a finished layer: on disk, or in memory if its weights are there."""
        layer, prefix, file = self.layers[index], f"{self.family.layers}.{index}.", str(self._layer(index))
        places = {name: Place(file, prefix + name) for name in layer.state_dict()}
        if hasattr(layer, "source"):
            self._point(index, places)
        else:
            layer.load_state_dict(streaming.read(places))

    def _point(self, index, places):
        """Let a layer on disk read its tensors from places {name: Place}."""
        self.layers[index].source.places = dict(places)
        self.model.source.places |= {f"{self.family.layers}.{index}.{name}": place for name, place in places.items()}

    def write(self, name, tensors):
        """Write {key: tensor} as a safetensors file in the folder."""
        with self.room(name, size(tensors)):
            streaming.write(self.folder / name, tensors)

    def write_json(self, name, content):
        """Write a JSON-able value to a file in the folder."""
        with self.room(name), replacing(self.folder / name) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    @contextlib.contextmanager
    def room(self, name, nbytes=None):
        """Turn a full, unwritable or missing disk into a one-line InputError. nbytes: of the file."""
        try:
            with os_errors():
                yield
        except OSError as error:
            need = "cannot be written" if nbytes is None else f"needs {nbytes / 1e9:.3f} GB"
            room = f", {shutil.disk_usage(self.folder).free / 1e9:.3f} GB are free" if self.folder.is_dir() else ""
            raise InputError(f"{self.place}: {name} {need}{room} ({error.strerror or error}); {self.advice}") from error
