"""Output directory of a run: finished layers, resume state, final checkpoint.

Until the run has ended, its subdirectory `progress` holds the settings of the run, a file per finished layer, and the
hidden states after the latest saved layer. On completion layers move from there into shards; the last of these, or the
index if there are several, makes the checkpoint loadable.
"""

import contextlib
import copy
import fcntl
import json
import shutil
import time
from dataclasses import asdict, astuple
from pathlib import Path

from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mixgpt.allocation.fisher import Gradients
from mixgpt.checkpoints import own_code, shards
from mixgpt.checkpoints.choices import FORMATS
from mixgpt.checkpoints.names import PROGRESS, begun
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.files import os_errors, replacing
from mixgpt.modeling import streaming
from mixgpt.pruning.targets import Outcome, Target
from quant import Grid, Scheme

PATIENCE = 10  # hidden states are saved when that takes less than 1/PATIENCE of the time since the last save


class RunDir:
    """Output directory of a run: finished layers, resume state, final checkpoint.

    As a context manager it locks the directory, and restores it if the run did not start.
    """

    def __init__(self, path, save_format="dense"):
        """Lock the directory in the first process, the one that writes. Raises InputError if another run holds it."""
        self.path, self.save_format = Path(path), save_format
        self.progress = self.path / PROGRESS
        self.writes = distributed.rank() == 0
        self.written, self.cost = time.monotonic(), 0.0
        self.sums = {}  # checksum of every tensor as it was in memory
        self.shards = {}  # name of a tensor -> name of its shard, once they are assigned
        if self.writes:
            self._lock()

    def _lock(self):
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.progress.mkdir(parents=True, exist_ok=True)
        self.lock = (self.progress / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
            raise InputError(f"--save {self.path}: is in use by another run") from error
        if not begun(self.path) and not empty(self.path):  # that run has just ended
            self.__exit__()
            raise InputError(f"--save {self.path}: exists and is not an empty folder")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.writes:
            return
        if begun(self.path) and self._kept_nothing():
            (self.progress / "run.json").unlink()
        if not begun(self.path):
            shutil.rmtree(self.progress, ignore_errors=True)
            for folder in self.made:
                if not any(folder.iterdir()):
                    folder.rmdir()
        self.lock.close()

    def _kept_nothing(self):
        """Whether no layer is finished and nothing of the result is written."""
        return not any(self.progress.glob("layer-*.json")) and empty(self.path)

    def start(self, model, family, identity):
        """Start a run, or resume the one interrupted here. identity: what both must share, {flag: value}."""
        self.model, self.family = model, family
        self.layers = family.layers_of(model)
        if self.writes:
            self._identify(identity)
            if self._shards().is_file():
                self.shards = json.loads(self._shards().read_text())
        self.shards = distributed.broadcast_object(self.shards)  # the others wait

    def _identify(self, identity):
        settings = self.progress / "run.json"
        if not settings.is_file():
            self._write_json(settings, identity)
            return
        for flag, value in json.loads(settings.read_text()).items():
            if identity.get(flag) != value:
                raise InputError(f"--resume: {flag} was {value} in the interrupted run in {self.path}, now it is "
                                 f"{identity.get(flag)}")
        for folder in (self.path, self.progress):  # partial files of a killed run
            for file in (*folder.glob("*.partial"), *folder.glob(".tmp*")):
                file.unlink()
        if self.save_format == "dense" and not self._shards().is_file():  # killed in `end`: layers are pruned again
            for file in self.path.glob("model*.safetensors*"):
                file.unlink()

    def _shards(self):
        return self.progress / "shards.json"

    def _note(self, index):
        return self.progress / f"layer-{index:05d}.json"

    def _layer(self, index):
        return self.progress / f"layer-{index:05d}.safetensors"

    def _places(self, index):
        """Return the files of a finished layer's tensors, {name in the model: file}."""
        names = [f"{self.family.layers}.{index}.{name}" for name in self.layers[index].state_dict()]
        files = {name: self.path / self.shards[name] for name in names if name in self.shards}
        return {name: files[name] if name in files and files[name].is_file() else self._layer(index) for name in names}

    def _finished(self, index):
        return self._note(index).is_file() and all(file.is_file() for file in set(self._places(index).values()))

    def _measured(self):
        return self.progress / f"gradients-{distributed.rank()}.safetensors"

    def keep_plan(self, plan, gradients):
        """Save the plan, {(layer, name): Target}, and the fisher.Gradients behind it, or None."""
        if gradients:
            self._write(self._measured(), {f"{kind}.{layer}.{name}": tensor for kind in ("rows", "tokens")
                                           for (layer, name), tensor in getattr(gradients, kind).items()})
        distributed.barrier()  # all have written theirs
        if self.writes:
            self._write_json(self.progress / "plan.json", {
                "gradients": gradients is not None,
                "targets": [[layer, name, *astuple(target)] for (layer, name), target in plan.items()]})

    @property
    def has_plan(self):
        return distributed.broadcast_object((self.progress / "plan.json").is_file())

    def kept_plan(self):
        """Return what `keep_plan` saved in the interrupted run, or (None, None)."""
        if not self.has_plan:
            return None, None
        kept = json.loads((self.progress / "plan.json").read_text())
        plan = {(layer, name): Target(*target) for layer, name, *target in kept["targets"]}
        if not kept["gradients"]:
            return plan, None
        gradients = Gradients({}, {})
        for key, tensor in load_file(self._measured()).items():
            kind, layer, name = key.split(".", 2)
            getattr(gradients, kind)[int(layer), name] = tensor
        return plan, gradients

    def begin(self, count, states=None):
        """Restore the model, and the calibration hidden states, to where the run was interrupted.

        count: number of layers to process, from the first. states: {name: hidden states}, overwritten. Returns the
        first unfinished layer, and the outcomes of those before.
        """
        first = next((index for index in range(count) if not self._finished(index)), count)
        if states is not None and first < count:
            borders = {int(file.stem.split("-")[1]) for file in self.progress.glob("state-*.safetensors")}
            first = max((index for index in borders if index <= first and all(
                self._state(index, rank).is_file() for rank in range(distributed.world()))), default=0)
            if first:
                for name, kept in load_file(self._state(first, distributed.rank())).items():
                    states[name].copy_(kept)
        outcomes = {}
        for index in range(first):
            self._take(index)
            grids = self.progress / f"grids-{index:05d}.safetensors"
            tensors = load_file(grids) if grids.is_file() else {}
            notes = json.loads(self._note(index).read_text())
            self.sums |= notes["checksums"]
            for name, note in notes["matrices"].items():
                grid = note["scheme"] and Grid(Scheme(**note["scheme"]), *(
                    tensors[f"{name}.{part}"] for part in ("scale", "zero", "group")))
                outcomes[index, name] = Outcome(note["error"], note["percdamp"], grid)
        return first, outcomes

    def _state(self, index, rank):
        return self.progress / f"state-{index:05d}-{rank}.safetensors"

    def _take(self, index):
        """Point the model at the files of a finished layer."""
        layer, prefix = self.layers[index], f"{self.family.layers}.{index}."
        places = {name.removeprefix(prefix): (str(file), name) for name, file in self._places(index).items()}
        if hasattr(layer, "source"):
            layer.source.places = places
            self.model.source.places |= {prefix + name: place for name, place in places.items()}
        else:
            layer.load_state_dict(streaming.read(places))

    @contextlib.contextmanager
    def _room(self, name, nbytes=None):
        """Turn a full or unwritable disk into a one-line InputError, leaving no partial file."""
        try:
            with os_errors():
                yield
        except OSError as error:
            for file in (*self.path.rglob("*.partial"), *self.path.rglob(".tmp*")):
                file.unlink(missing_ok=True)
            need = "cannot be written" if nbytes is None else f"needs {nbytes / 1e9:.3f} GB"
            free = shutil.disk_usage(self.path).free
            raise InputError(f"--save {self.path}: {name} {need}, {free / 1e9:.3f} GB are free "
                             f"({error.strerror or error}); "
                             "free some space and continue with --resume") from error

    def _write(self, file, tensors):
        """Write {key: tensor} as a safetensors file. Returns {key: checksum}."""
        with self._room(Path(file).name, shards.size(tensors)):
            return streaming.write(file, tensors)

    def _write_json(self, file, content):
        with self._room(file.name), replacing(file) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def finish(self, index, layer, outcomes, states=None):
        """Save a finished layer, which is on the device, {(layer, name): Outcome}, and the hidden states after it."""
        if self.writes:
            self._keep(index, layer, outcomes)
        distributed.barrier()  # the others wait
        if hasattr(layer, "source"):
            self._take(index)
        if states is not None and distributed.broadcast_object(time.monotonic() - self.written >= PATIENCE * self.cost):
            self._keep_states(index + 1, states)

    def _keep(self, index, layer, outcomes):
        sums = self._write(self._layer(index), {f"{self.family.layers}.{index}.{name}": tensor
                                                for name, tensor in layer.state_dict().items()})
        self.sums |= sums
        if grids := {name: outcome.grid for (_, name), outcome in outcomes.items() if outcome.grid}:
            self._write(self.progress / f"grids-{index:05d}.safetensors", {
                f"{name}.{part}": getattr(grid, part) for name, grid in grids.items()
                for part in ("scale", "zero", "group")})
        self._write_json(self._note(index), {"checksums": sums, "matrices": {
            name: {"error": outcome.error, "percdamp": outcome.percdamp,
                   "scheme": outcome.grid and asdict(outcome.grid.scheme)} for (_, name), outcome in outcomes.items()}})

    def _keep_states(self, border, states):
        start = time.monotonic()
        self._write(self._state(border, distributed.rank()), states)
        distributed.barrier()  # all have written theirs
        if self.writes:
            for file in self.progress.glob("state-*.safetensors"):
                if int(file.stem.split("-")[1]) != border:
                    file.unlink()
        self.written = time.monotonic()
        self.cost = self.written - start

    def complete(self, tokenizer, grids):
        """Write the final checkpoint; what makes it loadable comes last. The model reads its layers from it afterwards.

        grids: {name of a linear: quant.Grid}. Formats other than dense load the whole model into memory.
        """
        if self.writes:
            state = shards.own_tensors(self.model)
            if not self.shards:
                with self._room("the tokenizer"):
                    own_code.keep(self.path, self.model, tokenizer)
                    tokenizer.save_pretrained(self.path)
            if self.save_format == "dense":
                self._assemble(state)
            else:
                self._convert(state, grids)
        self.shards = distributed.broadcast_object(self.shards)  # the others wait
        for index, layer in enumerate(self.layers if self.shards else ()):
            if hasattr(layer, "source") and str(self._layer(index)) in dict(layer.source.places.values()):
                self._take(index)

    def _assemble(self, state):
        """Move all tensors into shards, skipping existing shards. state: {name: tensor}, possibly on meta."""
        if not self.shards:
            with self._room("the configuration"):
                shards.write_configuration(self.path, self.model)
            self.shards = shards.split(state)
            self._write_json(self._shards(), self.shards)
        files = list(dict.fromkeys(self.shards.values()))
        for file in files:
            part = {name: state[name] for name, place in self.shards.items() if place == file}
            if not (self.path / file).is_file():
                with self._room(file, shards.size(part)):
                    shards.write(self.path / file, part, self._reader(state), self.sums)
            self._remove_layers()
        if len(files) > 1:
            self._write_json(self.path / SAFE_WEIGHTS_INDEX_NAME, {
                "metadata": {"total_size": shards.size(state)}, "weight_map": self.shards})

    def _reader(self, state):
        source = getattr(self.model, "source", None)
        return source.tensor if source else state.get

    def _remove_layers(self):
        """Remove the files of layers already in shards, so that the disk need not hold both."""
        for index in range(len(self.layers)):
            if self._layer(index) not in self._places(index).values():
                self._layer(index).unlink(missing_ok=True)

    def _convert(self, state, grids):
        """Write the model in a format other than dense."""
        model = self.model
        if hasattr(model, "source"):
            tensors = {name: model.source.tensor(name) for name in state}
            for name in self.sums:
                if streaming.checksum(tensors[name]) != self.sums[name]:
                    raise InputError(f"--save {self.path}: {name} in the file of its layer differs from what was in "
                                     "memory")
            model = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=tensors,
                                                dtype=model.dtype)
            model.generation_config = self.model.generation_config
        with self._room(f"the model in the format {self.save_format}"):
            FORMATS[self.save_format].load()(self.path, model, self.family, grids)

    def end(self):
        """Remove the resume state, in an order that leaves the run resumable at every point."""
        if not self.writes:
            return
        for pattern in ("state-*", "shards.json", "layer-*", "grids-*", "plan.json", "gradients-*"):
            for file in self.progress.glob(pattern):
                file.unlink()
        (self.progress / "run.json").unlink()
        shutil.rmtree(self.progress)




def held(path):
    """Return whether a run is writing to a directory."""
    try:
        with (Path(path) / PROGRESS / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def empty(path):
    """Return whether a directory holds nothing but remains of a run that never started."""
    return all(file.name == PROGRESS for file in Path(path).iterdir())
