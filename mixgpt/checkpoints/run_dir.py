"""The folder of --save: its lock, what an interrupted run has kept there, and the finished checkpoint.

Until the run has ended, its subdirectory `progress` holds

    run.json                      what identifies the run, and the choices that it has made, see `RunDir.kept`
    NAME-RANK.safetensors         tensors that belong to a choice: gradients, states of the dense model
    layer-00000.safetensors       a finished layer with the grids of its matrices and, as metadata, their errors
    distilled-00000.safetensors   the same layer, distilled; they replace those above once all are written
    quantized-00000.safetensors   the same layer, quantized after distillation
    result                        the finished checkpoint, until it has been verified and is moved into place

All are written under another name, flushed and renamed, so that a killed run can be continued to the same bits.
"""

import contextlib
import errno
import fcntl
import json
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME

from mixgpt.checkpoints.load import in_dtype
from mixgpt.common import distributed, files, hub, memory, program
from mixgpt.common.choices import CARD, FORMATS, PROGRESS, RECORD, is_interrupted_run
from mixgpt.common.errors import InputError, reading
from mixgpt.modeling import decoder, streaming
from mixgpt.modeling.placing import whole
from mixgpt.pruning.targets import Outcome
from mixgpt.quant import Grid

GRID = ("scale", "zero", "group")  # tensors of a quant.Grid
# The files that a save writes, of which the next one removes those of the one before; without the first it is no model.
WRITTEN = (CONFIG_NAME, RECORD, CARD, "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
           "model.sparse*.safetensors", "model.safetensors.index.json", "model.sparse.safetensors.index.json",
           "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template.*",
           f"{CHAT_TEMPLATE_DIR}/*.jinja")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # how file systems say that they have none
SHOWN = 60  # seconds after which each machine must see a file that another one has written


class RunDir(contextlib.AbstractContextManager):
    """The folder of --save, or a temporary one in its place, from which the model reads finished layers.

    As a context manager it is locked, and removed if nothing in it is worth going on from. A thread writes a layer
    while the next one is pruned: `save_layer` first waits for the one before, and raises its error.
    """

    def __init__(self, path, save_format="dense", nbytes=0, resume=True, overwrite=False, place=None,
                 advice="free some space and continue with --resume"):
        """Lock the folder in the first process, the one that writes.

        nbytes: of finished layers and result together. resume: accept an interrupted run. overwrite: accept a saved
        model, which `publish` replaces. place, advice: flag and path, and what to do, for errors. Raises InputError for
        a folder that is not empty, not writable, in use by another run or on a full disk, and leaves nothing behind.
        """
        self.path, self.folder, self.save_format = Path(path), Path(path) / PROGRESS, save_format
        self.result = self.folder / "result"
        self.place, self.advice, self.run = place or f"--save {path}", advice, {}  # run: content of run.json
        self.writes = distributed.rank() == 0
        self.thread, self.writing = ThreadPoolExecutor(1), None
        if self.writes:
            try:
                self.is_new = not self.path.exists()
                self._check(nbytes, resume, overwrite)
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = (self.folder / "lock").open("a")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.place}: is in use by another run") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise InputError(f"{self.place}: cannot be used ({error.strerror}); name another folder") from error
                print(f"warning  {self.place}: its file system has no locks; start no other run there", flush=True)
            if is_interrupted_run(self.path) and not resume:
                self.lock.close()
                raise InputError(f"{self.place}: holds an interrupted run; continue it with --resume, or remove "
                                 f"{self.folder}")

    def _check(self, nbytes, resume, overwrite):
        if resume and is_interrupted_run(self.path):
            with self._reading(self.folder / "run.json"):
                self.run = json.loads((self.folder / "run.json").read_text())
        left = {self.folder, self.folder / "lock", *self.folder.glob("*.partial")}  # by a run that never started
        unused = all(file in left for file in self.path.rglob("*"))
        if not (unused or is_interrupted_run(self.path) or overwrite and is_saved_model(self.path)):
            raise InputError(f"{self.place}: exists and is not an empty folder; name another one, or give --overwrite "
                             "to replace a saved model")
        free, in_memory = memory.room(self.folder)
        own = (self.path if self.published else self.folder).rglob("*.safetensors")
        needed = nbytes - sum(file.stat().st_size for file in own)
        if free < needed:
            there = "there, as its file system is memory" if in_memory else "there"
            raise InputError(f"{self.place}: finished layers and the result need {needed / 1e9:.3f} GB, "
                             f"{free / 1e9:.3f} GB are free {there}; free some, or name another folder")

    @property
    def published(self):
        """Whether the checkpoint of this run is in place, in the format that is asked for."""
        return self.run.get("published") == self.save_format

    def __exit__(self, *error):
        self.thread.shutdown()  # waits for it
        if self.writes:
            kept = any(self.folder.rglob("*.safetensors")) or "published" in self.run
            if not (is_interrupted_run(self.path) and kept):
                clear(self.path)
                if self.is_new and not any(self.path.glob("*")):
                    self.path.rmdir()
            self.lock.close()

    def open(self, model, identity):
        """Start a run, or go on with the one here. Raises InputError if that differs in its identity, {flag: value}."""
        identity = {"version of this program": program.__version__} | identity
        if self.writes and is_interrupted_run(self.path):
            program.check_signature(self.run, f"--resume: the run in {self.path}")
            before = self.run["identity"]
            for flag in before | identity:
                if flag != "--save-format" and before.get(flag) != identity.get(flag):  # earlier versions have it there
                    raise InputError(f"--resume: {flag} was {before.get(flag)} in the interrupted run in {self.path}, "
                                     f"now it is {identity.get(flag)}")
            for file in [*self.folder.rglob("*.partial"), *self.folder.rglob(".tmp*"),
                         *self.path.glob(f"{RECORD}.*.partial")]:  # that it was writing
                file.unlink()
        elif self.writes:
            self.run = program.signature() | {"token": secrets.token_hex(8), "identity": identity}
            self.write_json(self.folder / "run.json", self.run)
        self.run = distributed.broadcast_object(json.loads(json.dumps(self.run)))
        self._check_shared()
        self.model, self.layers, self.layers_path = model, decoder.layers_of(model), decoder.layers_path(model)
        self.before = {}  # {(stage, layer): where the weights of a layer on disk were before it was finished}
        self.begin("layer")
        if isinstance(self.run.get("distilled"), dict):  # not a reason why there is no distilled model
            self.take_distilled()

    def _check_shared(self):
        """Raise InputError in all processes if one of them does not see what the first one has written."""
        end, seen = time.monotonic() + SHOWN, False
        while not seen and time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                seen = json.loads((self.folder / "run.json").read_text()) == self.run
            time.sleep(0 if seen else 1)
        if not all(distributed.all_gather_object(seen)):
            raise InputError(f"{self.place}: a process does not see what the first one writes there; it must be a "
                             "folder that all machines share")

    def begin(self, stage, scheme=None):
        """Begin a stage, "layer" or "quantized", which names its files. scheme: quant.Scheme of its matrices."""
        self.stage, self.scheme = stage, scheme

    def _reading(self, file):
        return reading(f"--resume: {file} cannot be read; remove {self.folder} to start over")

    def kept(self, name, make):
        """Return what the interrupted run has kept under a name; else make() and keep it.

        make: returns a JSON-able value, that of the first process counts, and {key: tensor} of this process.
        """
        file = self.folder / f"{name}-{distributed.rank()}.safetensors"
        if name in self.run:
            with self._reading(file):
                return self.run[name], load_file(file) if file.exists() else {}
        value, tensors = make()
        if tensors:
            with self._disk_errors(file.name):
                streaming.write(file, tensors)
        value = distributed.broadcast_object(value)  # once all have written theirs
        self.keep(name, value)
        return value, tensors

    def keep(self, name, value):
        """Keep a JSON-able value under a name."""
        self.run[name] = value
        self.write_json(self.folder / "run.json", self.run)

    def resume_from(self, count):
        """Give a model on disk its weights before the stage back, and return what that has finished of `count` layers.

        Returns a list with {(layer, name): Outcome} of each layer; the model gets them by `load_layer`.
        """
        self.flush()
        for (stage, index), locations in self.before.items():
            if stage == self.stage:
                self.layers[index].disk_weights = locations
        finished = []
        while len(finished) < count and (outcomes := self._outcomes(len(finished))) is not None:
            finished.append(outcomes)
        return finished

    def _outcomes(self, index):
        """Return {(layer, name): Outcome} of a finished layer, None if there is none, or it cannot be read."""
        file, outcomes = self._file(index), {}
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as tensors:
                for name, (error, percdamp) in json.loads(tensors.metadata()["outcomes"]).items():
                    grid = self.scheme and Grid(self.scheme, *(
                        tensors.get_tensor(f"grid.{name}.{part}").clone() for part in GRID))
                    outcomes[index, name] = Outcome(error, percdamp, grid)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if self.stage == "layer" and isinstance(self.run.get("distilled"), dict):  # pruned again, it would stay so
                with self._reading(file):
                    raise
            print(f"resume   {file} cannot be read ({error}): pruning again from layer {index}", flush=True)
            return None
        return outcomes

    def load_layer(self, index):
        """Let the model have a finished layer: on disk, or in memory if its weights are there."""
        layer, prefix, file = self.layers[index], f"{self.layers_path}.{index}.", str(self._file(index))
        locations = {name: streaming.TensorLocation(file, prefix + name) for name in layer.state_dict()}
        if before := streaming.disk_weights(layer):
            self.before.setdefault((self.stage, index), before)
            layer.disk_weights = locations
        else:
            layer.load_state_dict({name: streaming.mapped(location) for name, location in locations.items()})

    def save_layer(self, index, layer, outcomes, distilled=False):
        """Start writing a finished layer, {(layer, name): Outcome}; the layer is on the device.

        distilled: whether it does not count before `take_distilled`.
        """
        self.flush()
        if self.writes:
            weights = {f"{self.layers_path}.{index}.{name}": tensor.to("cpu")
                       for name, tensor in layer.state_dict().items()}
            file = self._file(index, "distilled" if distilled else self.stage)
            self.writing = self.thread.submit(self._write_layer, file, weights, outcomes)
        if not distilled and streaming.disk_weights(layer):
            self.load_layer(index)

    def _write_layer(self, file, weights, outcomes):
        """Write a layer with its outcomes."""
        grids = {f"grid.{name}.{part}": getattr(outcome.grid, part) for (_, name), outcome in outcomes.items()
                 if outcome.grid for part in GRID}
        content = {name: [outcome.error, outcome.percdamp] for (_, name), outcome in outcomes.items()}
        with self._disk_errors(file.name):
            streaming.write(file, weights | grids, outcomes=json.dumps(content))

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

    def _file(self, index, stage=None):
        return self.folder / f"{stage or self.stage}-{index:05d}.safetensors"

    def write_json(self, file, content):
        """Write a JSON-able value to a file, in the first process."""
        self.write_text(file, json.dumps(content, indent=1) + "\n")

    def write_text(self, file: Path, text: str) -> None:
        """Write a text to a file, in the first process."""
        if self.writes:
            with self._disk_errors(file.name), files.replacing(file) as partial:
                partial.write_text(text)

    def _disk_errors(self, name):
        return files.writing(f"{self.place}: {name}", self.advice)

    def write_checkpoint(self, tokenizer, grids, record):
        """Write the final checkpoint beside the layers, unless it is in place already. Returns its folder.

        grids: {name of a linear: quant.Grid}. record: of the run so far. Formats that do not stream load the model.
        """
        if self.published:
            return self.path
        if self.writes:
            shutil.rmtree(self.result, ignore_errors=True)
            self.result.mkdir()
            self.write_json(self.result / RECORD, record)
            with reading("the tokenizer cannot be saved"), self._disk_errors("the tokenizer"):
                owners = [each for each in (vars(self.model.config), tokenizer.init_kwargs) if each.get("auto_map")]
                folder = self.model.config.name_or_path  # "" for a model built in memory
                code = list(Path(folder).glob("*.py")) if owners and folder else []
                for file in code:  # for others to load: it is never run here
                    shutil.copyfile(file, self.result / file.name)
                for owner in () if code else owners:  # of a hub id, whose code is not fetched
                    del owner["auto_map"]
                tokenizer.save_pretrained(self.result)
            with self._disk_errors("the model"), hub.silenced():
                save_format, model = FORMATS[self.save_format], in_dtype(self.model, streaming.stored_dtype(self.model))
                with contextlib.nullcontext() if save_format.streams else whole(model, torch.device("cpu")):
                    save_format.load()(self.result, model, grids)
                for file in self.result.glob("*.safetensors"):  # safetensors lets nobody else read it
                    file.chmod((self.result / RECORD).stat().st_mode)
        distributed.barrier()  # all read it
        return self.result

    def publish(self):
        """Move the checkpoint into place, and remove what a save before it has written; other files stay.

        If this is interrupted, the folder holds no model, and the run can go on.
        """
        distributed.barrier()  # others may still read it
        if self.published:
            return
        self.keep("published", None)
        with self._disk_errors("the model"):
            for file in [file for pattern in WRITTEN for file in self.path.glob(pattern)] if self.writes else ():
                if not file.is_dir():
                    file.unlink()
            result = [file for file in self.result.rglob("*") if file.is_file()] if self.writes else ()
            for file in sorted(result, key=lambda file: file.name == CONFIG_NAME):
                (place := self.path / file.relative_to(self.result)).parent.mkdir(exist_ok=True)
                file.replace(place)
        self.keep("published", self.save_format)
        distributed.barrier()  # all look for it there

    def close(self):
        """Remove what was kept to go on from: the run is complete."""
        distributed.barrier()  # others may still read the layers there
        if self.writes:
            clear(self.path)


def identity(model: torch.nn.Module, asked: dict[str, Any], calibration: torch.Tensor | None,
             further: torch.Tensor | None) -> dict[str, Any]:
    """Return what a resumed run must have in common with the first one, {flag: value}.

    asked: the part of it that is known from the command line. calibration, further: tokens, (N, T) and (n, T).
    """
    return asked | {
        "--dtype": str(model.dtype).removeprefix("torch."), "model's weights": streaming.fingerprint(model),
        "calibration tokens": None if calibration is None else streaming.digest(torch.cat([calibration, further]))}


def completed(path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run that has ended in a folder, None if there is none or it is not whole.

    asked: {flag: value} of now. Raises InputError if another version of this program wrote it, or if it was asked for
    something else. Removes what the run kept to go on from: it may have been killed while it did this.
    """
    folder = Path(path)
    if is_interrupted_run(folder) or not ((folder / RECORD).exists() and any(folder.glob("*.safetensors"))):
        return None
    with reading(f"--resume: {folder / RECORD}"):
        record = json.loads((folder / RECORD).read_text())
        program.check_signature(record, f"--resume: the run in {folder}")
        before = {name if name in ("model", "dataset") else f"--{name.replace('_', '-')}": value
                  for name, value in record["settings"].items()} | record["identity"]
    for flag, value in json.loads(json.dumps(asked)).items():
        resolved = flag in ("--seqlen", "--dtype", "--bos") and value in (None, "auto")
        if value != before.get(flag) and not resolved:
            raise InputError(f"--resume: {flag} was {before.get(flag)} in the complete run in {folder}, now it is "
                             f"{value}; to evaluate its result again, give the folder as the model")
    if distributed.rank() == 0:
        clear(folder)
    return record


def is_saved_model(path):
    """Return whether a folder holds what a run of this program has saved: configuration, weights and record."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = json.loads((path / RECORD).read_text())
        return "program" in record and (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))
    return False


def clear(path):
    """Remove what a run kept to go on from. What comes first marks it as complete, or as never begun."""
    folder = Path(path) / PROGRESS
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
