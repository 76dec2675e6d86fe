"""Files of finished layers, which a thread writes while the next layer is pruned.

    layer-00000.safetensors, .json       a finished layer with the grids of its matrices, and their errors; it counts
                                         once the second file is there
    distilled-00000.safetensors, .json   the same layer, distilled; they replace those above once all are written

All are written under another name, flushed and renamed, so that a killed run can be continued to the same bits.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mixgpt.common import distributed
from mixgpt.common.choices import GRIDS
from mixgpt.common.files import replacing, writing
from mixgpt.modeling import streaming
from mixgpt.modeling.decoder import layers_of, layers_path
from mixgpt.modeling.streaming import TensorLocation, disk_weights
from mixgpt.pruning.targets import Outcome
from quant import Grid


class LayerFiles(contextlib.AbstractContextManager):
    """Finished layers in a folder; the model reads them from there if its weights are on disk.

    Writes are queued one at a time: `save_layer` first waits for the previous one and re-raises its error. As a context
    manager it waits for the thread, so that the folder can be removed.
    """

    def __init__(self, folder, place, advice):
        """folder: exists. place, advice: flag and path, and what to do, for errors."""
        self.folder, self.place, self.advice = Path(folder), place, advice
        self.writes = distributed.rank() == 0
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def __exit__(self, *error):
        self.thread.shutdown()

    def open(self, model):
        """Take the layers of a dense model."""
        self.model, self.layers, self.layers_path, self.dense = model, layers_of(model), layers_path(model), None

    def resume_from(self, count):
        """Give a model on disk its dense weights back, and return what is finished of its first `count` layers.

        Returns a list with {(layer, name): Outcome} of each layer; the model gets them by `load_layer`.
        """
        self.flush()
        self.dense = self.dense or [getattr(disk_weights(layer), "locations", None) for layer in self.layers]
        for layer, locations in zip(self.layers, self.dense, strict=True):
            if locations:
                disk_weights(layer).locations = locations
        finished = []
        while len(finished) < count and (outcomes := self._outcomes(len(finished))) is not None:
            finished.append(outcomes)
        return finished

    def _outcomes(self, index):
        """Return {(layer, name): Outcome} of a finished layer, None if there is none, or it cannot be read."""
        file, outcomes = self._file(index), {}
        if not file.with_suffix(".json").exists():
            return None
        try:
            with safe_open(file, "pt") as tensors:
                for name, matrix in json.loads(file.with_suffix(".json").read_text()).items():
                    scheme = GRIDS.check(matrix["grid"]).load() if matrix["grid"] else None
                    grid = scheme and Grid(scheme(**matrix["scheme"]), *(
                        tensors.get_tensor(f"grid.{name}.{part}").clone() for part in ("scale", "zero", "group")))
                    outcomes[index, name] = Outcome(matrix["error"], matrix["percdamp"], grid)
        except (OSError, ValueError, SafetensorError) as error:
            print(f"resume   {file} cannot be read ({error}): pruning again from layer {index}", flush=True)
            return None
        return outcomes

    def load_layer(self, index):
        """Let the model have a finished layer: on disk, or in memory if its weights are there."""
        layer, prefix, file = self.layers[index], f"{self.layers_path}.{index}.", str(self._file(index))
        locations = {name: TensorLocation(file, prefix + name) for name in layer.state_dict()}
        if weights := disk_weights(layer):
            weights.locations = locations
        else:
            layer.load_state_dict(streaming.read(locations))

    def save_layer(self, index, layer, outcomes, kind="layer"):
        """Start writing a finished layer, {(layer, name): Outcome}; the layer is on the device.

        kind: "distilled" for a layer that does not count before `take_distilled`.
        """
        self.flush()
        if self.writes:
            weights = {f"{self.layers_path}.{index}.{name}": tensor.to("cpu")
                       for name, tensor in layer.state_dict().items()}
            self.writing = self.thread.submit(self._write_layer, self._file(index, kind), weights, outcomes)
        if kind == "layer" and disk_weights(layer):
            self.load_layer(index)

    def _write_layer(self, file, weights, outcomes):
        """Write a layer, then the outcomes that make it count."""
        grids = {f"grid.{name}.{part}": getattr(outcome.grid, part) for (_, name), outcome in outcomes.items()
                 if outcome.grid for part in ("scale", "zero", "group")}
        self.write(file, weights | grids)
        self.write_json(file.with_suffix(".json"), {
            name: {"error": outcome.error, "percdamp": outcome.percdamp,
                   "grid": outcome.grid and outcome.grid.scheme.name,
                   "scheme": outcome.grid and asdict(outcome.grid.scheme)} for (_, name), outcome in outcomes.items()})

    def flush(self):
        """Wait in all processes until all saved layers are written. Raises what prevented it."""
        if self.writing:
            self.writing.result()
        distributed.barrier()  # the first process writes, all read

    def take_distilled(self):
        """Let the distilled layers, which are all written, replace the pruned ones."""
        if self.writes:
            for file in self.folder.glob("distilled-*"):
                file.replace(self.folder / file.name.replace("distilled", "layer"))
        distributed.barrier()

    def _file(self, index, kind="layer"):
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def write(self, file, tensors):
        """Write {key: tensor} as a safetensors file."""
        with self.disk_errors(file.name):
            streaming.write(file, tensors)

    def write_json(self, file, content):
        """Write a JSON-able value to a file."""
        with self.disk_errors(file.name), replacing(file) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def disk_errors(self, name):
        """Be `files.writing` for what has this name."""
        return writing(f"{self.place}: {name}", self.advice)
