"""Output directory of a run: finished layers, resume state, final checkpoint.

Until the run has ended, its subdirectory `progress` holds the settings of the run, a file per finished layer, and the
hidden states after the latest saved layer, all of them sealed. What is damaged there is computed again, along with all
that came after it. On completion layers move from there into shards; the last of these, or the index if there are
several, makes the checkpoint loadable.
"""

import contextlib
import copy
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from dataclasses import asdict, astuple
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mixgpt.allocation.fisher import Gradients
from mixgpt.checkpoints import own_code, sealed, shards
from mixgpt.checkpoints.choices import FORMATS
from mixgpt.checkpoints.layer_files import PARTIAL, LayerFiles, source_of
from mixgpt.checkpoints.names import PROGRESS, RECORD, begun
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.files import replacing
from mixgpt.modeling import streaming
from mixgpt.modeling.layout import layout_of
from mixgpt.modeling.streaming import Place
from mixgpt.pruning.targets import Outcome, Target
from modelutils import place_for
from quant import Grid, Scheme

PATIENCE = 10  # hidden states are saved when that takes less than 1/PATIENCE of the time since the last save
NUMBERED = re.compile(r"(layer|grids|state)-(\d{5,})(-\d+)?\.(json|safetensors)")  # files of a layer, in progress
OWN = re.compile(NUMBERED.pattern + r"|(run|plan|shards|undistilled)\.json|gradients-\d+\.safetensors|"
                 r".*\.partial|\.tmp.*")


class RunDir(LayerFiles):
    """Output directory of a run: finished layers, resume state, final checkpoint.

    As a context manager it locks the directory, and restores it if the run did not start.
    """

    def __init__(self, path, save_format="dense"):
        """Lock the directory in the first process, the one that writes. Raises InputError if another run holds it."""
        super().__init__(path)
        self.save_format = save_format
        self.place, self.advice = f"--save {path}", "free some space and continue with --resume"
        self.progress = self.folder = self.path / PROGRESS
        self.written, self.cost = time.monotonic(), 0.0  # of hidden states, as is the next
        self.border = None  # number of the layer behind those that this process has written last
        self.sums = {}  # checksum of every tensor as it was in memory
        self.shards = {}  # key of a tensor in the checkpoint -> name of its shard, once they are assigned
        self.ended = False
        if self.writes:
            self._lock()

    def _lock(self):
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.progress.mkdir(parents=True, exist_ok=True)
            self.lock = _open_lock(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise InputError(f"{self.place}: {error.filename} cannot be used ({error.strerror}); remove the folder to "
                             "start over") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.lock)
            raise InputError(f"{self.place}: is in use by another run") from error
        except OSError as error:  # some file systems have no locks
            os.close(self.lock)
            raise InputError(f"{self.place}: cannot be locked ({error.strerror}); name a folder on another disk") from (
                error)
        if not begun(self.path) and not unused(self.path):  # that run has just ended
            clear(self.path)
            os.close(self.lock)
            raise InputError(f"{self.place}: exists and is not an empty folder")

    def __exit__(self, kind, error, trace):
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._release(error)

    def _release(self, error):
        """Unlock the directory. error: what ended the run, or None."""
        gone = not self.path.is_dir() or not (self.ended or self.progress.is_dir())
        if self.writes:
            if not gone and begun(self.path) and self._kept_nothing():
                (self.progress / "run.json").unlink()
            if not begun(self.path):
                clear(self.path)
                for folder in self.made:
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()
            os.close(self.lock)
        if gone and isinstance(error, OSError | ValueError):
            raise self._gone() from error

    def _kept_nothing(self):
        """Whether no layer is finished and nothing of the result is written."""
        return not any(self.progress.glob("layer-*.json")) and unused(self.path)

    def start(self, model, family, identity, sums):
        """Start a run, or resume the one interrupted here.

        identity: what both must share, {flag: value}. sums: {name: checksum} of the model's weights.
        """
        super().start(model, family)
        self.sums, self.layout = dict(sums), layout_of(model)
        self.run = json.dumps(identity, sort_keys=True)  # seals its files
        if self.writes:
            self._identify(identity)
            self.shards = self._kept_shards()
        self.shards = distributed.broadcast_object(self.shards)  # the others wait

    def _identify(self, identity):
        settings = self.progress / "run.json"
        if not begun(self.path):
            if self._files("layer"):
                tell("progress/run.json is missing: starting over")
            self._remove(*self.progress.iterdir())
            with self._room(settings.name):
                sealed.write_json(settings, identity, "")
            return
        try:
            before = sealed.read_json(settings, "")
        except sealed.Damaged as error:
            raise InputError(f"--resume: {settings} is damaged, or of another version of this program; remove "
                             f"{self.path} to start over") from error
        for flag in {**before, **identity}:
            if before.get(flag) != identity.get(flag):
                raise InputError(f"--resume: {flag} was {before.get(flag)} in the interrupted run in {self.path}, now "
                                 f"it is {identity.get(flag)}")
        for folder in (self.path, self.progress):
            self._remove(*(file for pattern in PARTIAL for file in folder.glob(pattern)))

    def _kept_shards(self):
        """Return {name of a tensor: its shard} of the interrupted run, {} unless all its shards are intact.

        Otherwise they are removed, and their layers are pruned again.
        """
        if self.save_format != "dense":
            return {}
        with contextlib.suppress(sealed.Damaged):
            kept, sums = sealed.read_json(self._shards(), self.run), dict(self.sums)
            for index in set(self._files("layer").values()):
                with contextlib.suppress(sealed.Damaged):
                    sums |= sealed.read_json(self._note(index), self.run)["checksums"]
            try:
                sealed.check_tensors(self._in_shards(kept, self.model.state_dict()), sums)
                return kept
            except sealed.Damaged as damage:
                tell(f"{damage} is damaged: it is written again")
        self._remove_shards()
        return {}

    def _remove_shards(self):
        self.shards = {}
        if self.save_format == "dense" and self.writes:
            self._remove(self._shards(), *self.path.glob("model*.safetensors*"))

    def _files(self, *kinds):
        """Return {file: number of its layer} of all files of these kinds."""
        named = {file: NUMBERED.fullmatch(file.name) for file in self.progress.iterdir()}
        return {file: int(match[2]) for file, match in named.items() if match and match[1] in kinds}

    def _remove(self, *files):
        """Remove files of this run; in `progress` leave alone those of others."""
        for file in files:
            if file.parent != self.progress or OWN.fullmatch(file.name):
                _delete(file)

    def _shards(self):
        return self.progress / "shards.json"

    def _plan(self):
        return self.progress / "plan.json"

    def _undistilled(self):
        return self.progress / "undistilled.json"

    def _note(self, index):
        return self.progress / f"layer-{index:05d}.json"

    def _grids(self, index):
        return self.progress / f"grids-{index:05d}.safetensors"

    def _state(self, index, rank):
        return self.progress / f"state-{index:05d}-{rank}.safetensors"

    def _measured(self):
        return self.progress / f"gradients-{distributed.rank()}.safetensors"

    def _in_shards(self, shards, names):
        """Return where tensors of these names are in shards that are written, {name: Place}. shards: {key: file}."""
        written = {file for file in set(shards.values()) if (self.path / file).is_file()}
        places = {name: self.layout.get(name, (name, None)) for name in names}
        return {name: Place(str(self.path / shards[key]), key, part) for name, (key, part) in places.items()
                if shards.get(key) in written}

    def _places(self, index):
        """Return where a finished layer's tensors are, {name in the model: Place}."""
        return super()._places(index) | self._in_shards(self.shards, self._names(index))

    def keep_plan(self, plan, gradients):
        """Save the plan, {(layer, name): Target}, and the fisher.Gradients behind it, or None."""
        if gradients:
            self._write(self._measured(), {f"{kind}.{layer}.{name}": tensor for kind in ("rows", "tokens")
                                           for (layer, name), tensor in getattr(gradients, kind).items()})
        distributed.barrier()  # all have written theirs
        if self.writes:
            self._write_json(self._plan(), {
                "gradients": gradients is not None,
                "targets": [[layer, name, *astuple(target)] for (layer, name), target in plan.items()]})

    def kept_plan(self):
        """Return what `keep_plan` saved in the interrupted run, or (None, None).

        Without it, or if it is damaged, all is computed again: measured anew on a GPU, a plan might differ.
        """
        try:
            kept, damage = self._read_plan(), ""
        except sealed.Damaged as error:
            kept, damage = (None, None), str(error)
        damages = distributed.all_gather_object(damage)
        if not any(damages):
            return kept
        if self.writes:
            if self._files("layer") or self._plan().exists():
                tell(f"progress/{next(filter(None, damages))} is damaged or missing: pruning again from layer 0")
            self._remove(*(file for file in self.progress.iterdir() if file.name != "run.json"))
        self._remove_shards()
        distributed.barrier()
        return None, None

    def _read_plan(self):
        kept = sealed.read_json(self._plan(), self.run)
        plan = {(layer, name): Target(*target) for layer, name, *target in kept["targets"]}
        if not kept["gradients"]:
            return plan, None
        gradients = Gradients({}, {})
        for key, tensor in sealed.read_tensors(self._measured(), self.run).items():
            kind, layer, name = key.split(".", 2)
            getattr(gradients, kind)[int(layer), name] = tensor
        return plan, gradients

    def begin(self, count, states=None):
        """Restore the model, and the calibration hidden states, to where the run was interrupted.

        count: number of layers to process, from the first. states: {name: hidden states}, overwritten. Returns the
        first unfinished layer, and the outcomes of those before.
        """
        self._wait()
        finished, self.distilled, self.shards = distributed.broadcast_object(
            (*self._drop_damaged(count), self.shards) if self.writes else None)
        first = finished
        if states is not None and first < count:
            first = self._restore(first, states)
            if first < finished and self.writes:
                tell(f"of {finished} finished layers, going on from layer {first}: no later hidden states are kept")
        self._restore_sources()
        outcomes = {}
        for index in range(first):
            self._take(index)
            note = sealed.read_json(self._note(index), self.run)
            self.sums |= note["checksums"]
            tensors = sealed.read_tensors(self._grids(index), self.run) if note["grids"] else {}
            for name, matrix in note["matrices"].items():
                grid = matrix["scheme"] and Grid(Scheme(**matrix["scheme"]), *(
                    tensors[f"{name}.{part}"] for part in ("scale", "zero", "group")))
                outcomes[index, name] = Outcome(matrix["error"], matrix["percdamp"], grid)
        return first, outcomes

    def _drop_damaged(self, count):
        """Return how many layers are finished and intact, and what is kept about their distillation, or None.

        What is behind them is removed. Distilled layers come all at once: if only some were written, none is kept.
        """
        finished, noted = 0, max((index for index in range(count) if self._note(index).exists()), default=-1)
        try:
            while finished <= noted:
                self._check(finished)
                finished += 1
        except sealed.Damaged as damage:
            tell(f"progress/{damage} is damaged or missing: pruning again from layer {finished}")
            if self.shards:  # they hold what came after it
                self._remove_shards()
                return self._drop_damaged(count)
        distilled = [sealed.read_json(self._note(index), self.run)["distilled"] for index in range(finished)]
        if any(distilled) and not (finished == count and all(distilled)):
            tell("only some layers of the distilled model are there: pruning again from layer 0")
            finished = 0
        self._remove(*(file for file, index in self._files("layer", "grids").items() if index >= finished),
                     *(file for file, border in self._files("state").items() if border > finished))
        return finished, (finished and distilled[0]) or self._kept_undistilled()

    def _check(self, index):
        """Raise Damaged unless all files of a finished layer are as they were written. Shards were checked before."""
        note = sealed.read_json(self._note(index), self.run)
        sealed.check_tensors({name: place for name, place in self._places(index).items()
                              if place.file == str(self._layer(index))}, note["checksums"])
        if note["grids"]:
            sealed.read_tensors(self._grids(index), self.run)

    def keep_undistilled(self, reason):
        """Save why the model could not be distilled, so that a run that goes on leaves it as it is, too."""
        if self.writes:
            self._write_json(self._undistilled(), reason)

    def _kept_undistilled(self):
        """Return what `keep_undistilled` saved, None if it did not."""
        with contextlib.suppress(sealed.Damaged):
            return sealed.read_json(self._undistilled(), self.run)

    def _restore(self, finished, states):
        """Overwrite the hidden states by the latest ones before layer `finished`, or an earlier one. Returns which."""
        borders = sorted({border for border in self._files("state").values() if border <= finished}, reverse=True)
        for border in distributed.broadcast_object(borders):
            try:
                kept, damage = sealed.read_tensors(self._state(border, distributed.rank()), self.run), ""
            except sealed.Damaged as error:
                kept, damage = {}, str(error)
            damages = distributed.all_gather_object(damage)
            if not any(damages):
                for name, tensor in kept.items():
                    states[name].copy_(tensor)
                return border
            if self.writes:
                tell(f"progress/{next(filter(None, damages))} is damaged or missing")
        return 0

    def _take(self, index):
        """Let the model have a finished layer: on disk, or in memory if its weights are there."""
        layer, prefix = self.layers[index], f"{self.family.layers}.{index}."
        if source_of(layer):
            super()._take(index)
        else:
            layer.load_state_dict({name.removeprefix(prefix): tensor
                                   for name, tensor in streaming.read(self._places(index)).items()})

    def _write(self, file, tensors):
        """Write {key: tensor} as a sealed safetensors file. Returns {key: checksum}."""
        with self._room(Path(file).name, shards.size(tensors)):
            return sealed.write_tensors(file, tensors, self.run)

    def _write_json(self, file, content):
        with self._room(file.name):
            sealed.write_json(file, content, self.run)

    def write_record(self, record):
        """Write the record of the run."""
        with self._room(RECORD), replacing(self.path / RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")

    def finish(self, index, layer, outcomes, states=None, distilled=None):
        """Let the thread save a finished layer, {(layer, name): Outcome}, and at times the hidden states after it.

        The layer is on the device. Hidden states that the next layer would change meanwhile are waited for. distilled:
        what to keep about a distilled model, true, if the layer takes the place of one that was finished before.
        """
        self._wait()
        due = states is not None and distributed.broadcast_object(
            time.monotonic() - self.written >= PATIENCE * self.cost)
        kept = _apart(states) if due else None
        weights = self._leaving(index, layer) if self.writes else None
        self._hand_over(self._keep, index, weights, outcomes, kept, distilled)
        if due and kept is states:
            self._wait()
        if source_of(layer):
            self._take(index)

    def _keep(self, index, weights, outcomes, states, distilled):
        """Write a finished layer, then the note that makes it count, then hidden states after it, unless None."""
        if self.writes:
            sums = self._write(self._layer(index), weights())
            self.sums |= sums
            self._keep_outcomes(index, sums, outcomes, distilled)
        if states:
            self._keep_states(index + 1, states)
        if self.writes:
            self._remove_other_states()

    def _keep_outcomes(self, index, sums, outcomes, distilled):
        if grids := {name: outcome.grid for (_, name), outcome in outcomes.items() if outcome.grid}:
            self._write(self._grids(index), {
                f"{name}.{part}": getattr(grid, part) for name, grid in grids.items()
                for part in ("scale", "zero", "group")})
        matrices = {name: {"error": outcome.error, "percdamp": outcome.percdamp,
                           "scheme": outcome.grid and asdict(outcome.grid.scheme)}
                    for (_, name), outcome in outcomes.items()}
        self._write_json(self._note(index), {"checksums": sums, "grids": bool(grids), "distilled": distilled,
                                             "matrices": matrices})

    def _keep_states(self, border, states):
        start = time.monotonic()
        self._write(self._state(border, distributed.rank()), states)
        self.written, self.border = time.monotonic(), border
        self.cost = self.written - start

    def _remove_other_states(self):
        """Remove all hidden states but those written last, once all processes have written these."""
        if self.border and all(self._state(self.border, rank).is_file() for rank in range(distributed.world())):
            self._remove(*(file for file, border in self._files("state").items() if border != self.border))

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
            if source_of(layer) and str(self._layer(index)) in {place.file for place in layer.source.places.values()}:
                self._take(index)

    def _assemble(self, state):
        """Move all tensors into shards, skipping existing shards. state: {name: tensor}, possibly on meta."""
        tensors, names = shards.published(state, self.layout), {}
        for name in state:
            key, part = self.layout.get(name, (name, None))
            names.setdefault(key, {})[name] = part
        if not self.shards:
            with self._room("the configuration"):
                shards.write_configuration(self.path, self.model)
            self.shards = shards.split(tensors)
            self._write_json(self._shards(), self.shards)
        files = list(dict.fromkeys(self.shards.values()))
        for file in files:
            part = {key: tensors[key] for key, place in self.shards.items() if place == file}
            if not (self.path / file).is_file():
                with self._room(file, shards.size(part)):
                    shards.write(self.path / file, part, lambda key: shards.merged(
                        tensors[key], names[key], lambda name: self._unchanged(state, name)))
            self._remove_layers()
        if len(files) > 1:
            with self._room(SAFE_WEIGHTS_INDEX_NAME), replacing(self.path / SAFE_WEIGHTS_INDEX_NAME) as partial:
                partial.write_text(json.dumps({"metadata": {"total_size": shards.size(tensors)},
                                               "weight_map": self.shards}, indent=1) + "\n")

    def _unchanged(self, state, name):
        """Return a tensor, read from disk or in memory. Raises InputError if it is not what it was in memory before."""
        source = source_of(self.model)
        tensor = source.tensor(name) if source else state[name]
        if name in self.sums and self.sums[name] != streaming.checksum(tensor):
            raise InputError(f"{self.place}: {name} differs from what was in memory before; its file has changed")
        return tensor

    def _remove_layers(self):
        """Remove the files of layers already in shards, so that the disk need not hold both."""
        for index in range(len(self.layers)):
            if str(self._layer(index)) not in {place.file for place in self._places(index).values()}:
                self._layer(index).unlink(missing_ok=True)

    def _convert(self, state, grids):
        """Write the model in a format other than dense."""
        model = self.model
        if source_of(model):
            tensors = {name: self._unchanged(state, name) for name in state}
            model = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=tensors,
                                                dtype=model.dtype)
            model.generation_config = self.model.generation_config
        with self._room(f"the model in the format {self.save_format}"):
            FORMATS[self.save_format].load()(self.path, model, self.family, grids)

    def end(self):
        """Remove the resume state. What comes first marks the run as complete."""
        self.ended = True
        if self.writes:
            _delete(self.progress / "run.json")
            clear(self.path)


def clear(path):
    """Remove the resume state of a run that is complete or did not start; leave other files in its folder alone."""
    progress = Path(path) / PROGRESS
    for file in progress.glob("*"):
        if file.name == "lock" or OWN.fullmatch(file.name):
            _delete(file)
    with contextlib.suppress(OSError):  # other files, or no such folder
        progress.rmdir()


def _delete(file):
    """Remove a file, or a folder in its place."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def tell(text):
    print(f"resume   {text}", flush=True)


def _apart(states):
    """Return {name: hidden states} that stay as they are, copied from a GPU; the same if the host lacks ample room."""
    on_gpu = all(tensor.is_cuda for tensor in states.values())
    if not on_gpu or place_for(shards.size(states), torch.device("cpu")) != "host":
        return states
    return {name: tensor.to("cpu") for name, tensor in states.items()}


def _open_lock(path, flags):
    """Return a descriptor of the file by which a run locks its directory. Raises OSError if it is not a file."""
    file = Path(path) / PROGRESS / "lock"
    lock = os.open(file, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)  # does not wait for a named pipe
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise OSError(errno.EINVAL, "is not a file", str(file))
    return lock


def in_use(path):
    """Return whether a run is writing to a directory."""
    try:
        lock = _open_lock(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks, which is refused where the lock is taken
    finally:
        os.close(lock)
    return False


def unused(path):
    """Return whether a directory holds nothing but remains of a run that never started."""
    return all(file.name == PROGRESS for file in Path(path).iterdir())
