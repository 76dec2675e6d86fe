"""The folder of --save: its lock, what an interrupted run has kept there, and the finished checkpoint.

Until the run has ended, its subdirectory `progress` holds

    run.json                      what identifies the run, and the choices that it has made, see `RunDir.keep`
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME

from mixgpt.checkpoints.load import in_dtype
from mixgpt.common import distributed, files, hub, memory, program
from mixgpt.common.choices import CARD, FORMATS, PROGRESS, RECORD, is_interrupted_run
from mixgpt.common.errors import InputError, reading
from mixgpt.modeling import decoder, streaming
from mixgpt.modeling.linears import Key
from mixgpt.modeling.placing import whole
from mixgpt.pruning.targets import Outcome
from mixgpt.quant import Grid, Scheme

GRID = ("scale", "zero", "group")  # A quant.Grid has these tensors.
# The files that a save writes, of which the next one removes those of the one before; without the first it is no model.
WRITTEN = (CONFIG_NAME, RECORD, CARD, "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
           "model.sparse*.safetensors", "model*.safetensors.index.json", "tokenizer.*", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
           "sentencepiece*.model", "chat_template.*", f"{CHAT_TEMPLATE_DIR}/*.jinja")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # File systems without locks give one of these.
SHOWN = 60  # A file must be seen by all machines so many seconds after it was written.


class RunDir(contextlib.AbstractContextManager):
    """The folder of --save, or a temporary one in its place, from which the model reads finished layers.

    As a context manager it is locked, and removed if nothing in it is worth going on from. A thread writes a layer
    while the next one is pruned: `save_layer` first waits for the one before, and raises its error.
    """

    def __init__(self, path: str | Path, save_format: str = "dense", nbytes: int = 0, resume: bool = True,
                 overwrite: bool = False, place: str | None = None,
                 advice: str = "free some space and continue with --resume") -> None:
        """Lock the folder in the first process, the one that writes. Raises InputError, and leaves nothing behind.

        nbytes: of finished layers and result together. resume: accept an interrupted run. overwrite: accept a saved
        model, which `publish` replaces. place, advice: flag and path, and what to do, for errors.
        """
        self.path, self.folder, self.save_format = Path(path), Path(path) / PROGRESS, save_format
        self.result = self.folder / "result"
        self.place, self.advice = place or f"--save {path}", advice
        self.run: dict[str, Any] = {}  # The content of run.json.
        self.thread, self.writes = ThreadPoolExecutor(1), distributed.rank() == 0
        self.writing: Future | None = None
        if not self.writes:
            return
        try:
            self.is_new, goes_on = not self.path.exists(), is_interrupted_run(self.path)
            if resume and goes_on:
                with self._reading(self.folder / "run.json"):
                    self.run = json.loads((self.folder / "run.json").read_text())
            left = {self.folder, self.folder / "lock", *self.folder.glob("*.partial")}
            unused = all(file in left for file in self.path.rglob("*"))  # A run that never started may have left these.
            if not (unused or goes_on or overwrite and is_saved_model(self.path)):
                raise InputError(f"{self.place}: exists and is not an empty folder; name another one, or give "
                                 "--overwrite to replace a saved model")
            free, in_memory = memory.room(self.folder)
            own = (self.path if self.published else self.folder).rglob("*.safetensors")
            needed = nbytes - sum(file.stat().st_size for file in own)
            if free < needed:
                there = "there, as its file system is memory" if in_memory else "there"
                raise InputError(f"{self.place}: finished layers and the result need {needed / 1e9:.3f} GB, "
                                 f"{free / 1e9:.3f} GB are free {there}; free some, or name another folder")
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

    @property
    def published(self) -> bool:
        """Whether the checkpoint of this run is in place, in the format that is asked for."""
        return self.run.get("published") == self.save_format

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()  # This waits for the thread.
        if self.writes:
            kept = any(self.folder.rglob("*.safetensors")) or "published" in self.run
            if not (is_interrupted_run(self.path) and kept):
                clear(self.path)
                if self.is_new and not any(self.path.glob("*")):
                    self.path.rmdir()
            self.lock.close()

    def open(self, model: PreTrainedModel, identity: dict[str, Any]) -> None:
        """Start a run, or go on with the one here. Raises InputError if that differs in its identity, {flag: value}."""
        identity = {"version of this program": program.__version__} | identity
        if self.writes and is_interrupted_run(self.path):
            program.check_signature(self.run, f"--resume: the run in {self.path}")
            before = self.run["identity"]
            for flag in before | identity:
                if before.get(flag) != identity.get(flag):
                    raise InputError(f"--resume: {flag} was {before.get(flag)} in the interrupted run in {self.path}, "
                                     f"now it is {identity.get(flag)}")
            for folder, pattern in ((self.path, f"{RECORD}.*.partial"), (self.path, f"{CARD}.*.partial"),
                                    (self.folder, "**/*.partial"), (self.folder, "**/.tmp*")):
                for file in list(folder.glob(pattern)):  # The run was writing it when it was interrupted.
                    file.unlink()
        elif self.writes:
            self.run = program.signature() | {"token": secrets.token_hex(8), "identity": identity}
            self.write_json(self.folder / "run.json", self.run)
        self.run = distributed.broadcast_object(json.loads(json.dumps(self.run)))
        end, seen = time.monotonic() + SHOWN, False
        while not seen and time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                seen = json.loads((self.folder / "run.json").read_text()) == self.run
            time.sleep(0 if seen else 1)
        if not all(distributed.all_gather_object(seen)):
            raise InputError(f"{self.place}: a process does not see what the first one writes there; it must be a "
                             "folder that all machines share")
        self.model, self.layers, self.layers_path = model, decoder.layers_of(model), decoder.layers_path(model)
        # {(kind, layer): where the weights of a layer on disk were before it was finished}
        self.before: dict[tuple[str, int], dict[str, streaming.TensorLocation]] = {}
        self.begin("layer")
        if isinstance(self.run.get("distilled"), dict):  # A text says why there is no distilled model.
            self.take_distilled()

    def begin(self, kind: str, scheme: Scheme | None = None) -> None:
        """Begin the layer files of a kind, "layer" or "quantized", whose matrices have grids of a scheme."""
        self.kind, self.scheme = kind, scheme

    def _reading(self, file: Path) -> contextlib.AbstractContextManager[None]:
        return reading(f"--resume: {file} cannot be read; remove {self.folder} to start over")

    def keep(self, name: str, make: Callable[[], tuple[Any, dict[str, Tensor]]]) -> tuple[Any, dict[str, Tensor]]:
        """Return what the interrupted run has made under a name; else make() and keep it.

        make: returns a JSON-able value, of which the first process's counts, and {key: tensor} of this process.
        """
        file = self.folder / f"{name}-{distributed.rank()}.safetensors"
        if name in self.run:
            with self._reading(file):
                return self.run[name], load_file(file) if file.exists() else {}
        value, tensors = make()
        if tensors:
            self._write(file, tensors)
        value = distributed.broadcast_object(value)  # All have written their tensors before the name is kept.
        self.put(name, value)
        return value, tensors

    def put(self, name: str, value: Any) -> None:
        """Keep a JSON-able value under a name, in place of the one before."""
        self.run[name] = value
        self.write_json(self.folder / "run.json", self.run)

    def resume_from(self, count: int) -> list[dict[Key, Outcome]]:
        """Return the outcomes of those of `count` layers that have a file of this kind, up to the first gap."""
        self.flush()  # A model on disk gets its earlier weights back, and those of these files by `load_layer`.
        for (kind, index), locations in self.before.items():
            if kind == self.kind:
                self.layers[index].disk_weights = locations
        finished = []
        while (index := len(finished)) < count and (file := self._file(index)).exists():
            outcomes = {}
            try:
                with safe_open(file, "pt") as tensors:
                    for name, (error, percdamp) in json.loads(tensors.metadata()["outcomes"]).items():
                        grid = Grid(self.scheme, *(tensors.get_tensor(f"grid.{name}.{part}").clone()
                                                   for part in GRID)) if self.scheme else None
                        outcomes[index, name] = Outcome(error, percdamp, grid)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                if self.kind == "layer" and isinstance(self.run.get("distilled"), dict):
                    with self._reading(file):  # Pruned again, this layer would never be distilled.
                        raise
                print(f"resume   {file} cannot be read ({error}): pruning again from layer {index}", flush=True)
                break
            finished.append(outcomes)
        return finished

    def load_layer(self, index: int) -> None:
        """Let the model have a finished layer: on disk, or in memory if its weights are there."""
        layer, prefix, file = self.layers[index], f"{self.layers_path}.{index}.", str(self._file(index))
        locations = {name: streaming.TensorLocation(file, prefix + name) for name in layer.state_dict()}
        if before := streaming.disk_weights(layer):
            self.before.setdefault((self.kind, index), before)
            layer.disk_weights = locations
        else:
            layer.load_state_dict({name: streaming.mapped(location) for name, location in locations.items()})

    def save_layer(self, index: int, layer: nn.Module, outcomes: dict[Key, Outcome], distilled: bool = False) -> None:
        """Start writing a finished layer, which is on the device. distilled: it counts after `take_distilled` only."""
        self.flush()
        if self.writes:
            tensors = {f"{self.layers_path}.{index}.{name}": tensor.to("cpu")
                       for name, tensor in layer.state_dict().items()}
            tensors |= {f"grid.{name}.{part}": getattr(outcome.grid, part) for (_, name), outcome in outcomes.items()
                        if outcome.grid for part in GRID}
            content = {name: [outcome.error, outcome.percdamp] for (_, name), outcome in outcomes.items()}
            file = self._file(index, "distilled" if distilled else self.kind)
            self.writing = self.thread.submit(self._write, file, tensors, outcomes=json.dumps(content))
        if not distilled and streaming.disk_weights(layer):
            self.load_layer(index)

    def _write(self, file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        with self._disk_errors(file.name):
            streaming.write(file, tensors, **metadata)

    def flush(self) -> None:
        """Wait in all processes until all saved layers are written. Raises what prevented it."""
        if self.writing:
            self.writing.result()
        distributed.barrier()  # Only the first process writes, and all read.

    def take_distilled(self) -> None:
        """Let the distilled layers, which are all written, replace the pruned ones."""
        if self.writes:
            for file in self.folder.glob("distilled-*"):
                file.replace(self.folder / file.name.replace("distilled", "layer"))
        distributed.barrier()

    def _file(self, index: int, kind: str | None = None) -> Path:
        return self.folder / f"{kind or self.kind}-{index:05d}.safetensors"

    def write_json(self, file: Path, content: Any) -> None:
        """Write a JSON-able value to a file, in the first process."""
        self.write_text(file, json.dumps(content, indent=1) + "\n")

    def write_text(self, file: Path, text: str) -> None:
        """Write a text to a file, in the first process."""
        if self.writes:
            with self._disk_errors(file.name), files.replacing(file) as partial:
                partial.write_text(text)

    def _disk_errors(self, name: str) -> contextlib.AbstractContextManager[None]:
        return files.writing(f"{self.place}: {name}", self.advice)

    def write_checkpoint(self, tokenizer: PreTrainedTokenizerBase, grids: dict[str, Grid], record: dict[str, Any]
                         ) -> Path:
        """Write the final checkpoint beside the layers, unless it is in place already. Returns its folder.

        grids: by the names of linears. record: of the run so far. Formats that do not stream load the model.
        """
        if self.published:
            return self.path
        if self.writes:
            shutil.rmtree(self.result, ignore_errors=True)
            self.result.mkdir()
            self.write_json(self.result / RECORD, record)
            with reading("the tokenizer cannot be saved"), self._disk_errors("the tokenizer"):
                owners = [each for each in (vars(self.model.config), tokenizer.init_kwargs) if each.get("auto_map")]
                folder = self.model.config.name_or_path  # A model built in memory has "".
                code = list(Path(folder).glob("*.py")) if owners and folder else []
                for file in code:  # Others load it; it is never run here.
                    shutil.copyfile(file, self.result / file.name)
                for owner in () if code else owners:  # The code of a hub id is not fetched.
                    del owner["auto_map"]
                tokenizer.save_pretrained(self.result)
            with self._disk_errors("the model"), hub.silenced():
                save_format, model = FORMATS[self.save_format], in_dtype(self.model, streaming.stored_dtype(self.model))
                with contextlib.nullcontext() if save_format.streams else whole(model, torch.device("cpu")):
                    save_format.load()(self.result, model, grids)
                for file in self.result.glob("*.safetensors"):  # safetensors lets nobody else read them.
                    file.chmod((self.result / RECORD).stat().st_mode)
        distributed.barrier()  # All processes read it.
        return self.result

    def publish(self) -> None:
        """Move the checkpoint into place, and remove what a save before it has written; other files stay."""
        distributed.barrier()  # Other processes may still read it.
        if self.published:
            return
        self.put("published", None)  # Interrupted now, the run can go on, but the folder holds no model.
        with self._disk_errors("the model"):
            if self.writes:
                for file in [file for pattern in WRITTEN for file in self.path.glob(pattern) if not file.is_dir()]:
                    file.unlink()
                result = [file for file in self.result.rglob("*") if file.is_file()]
                for file in sorted(result, key=lambda file: file.name == CONFIG_NAME):
                    (place := self.path / file.relative_to(self.result)).parent.mkdir(exist_ok=True)
                    file.replace(place)
        self.put("published", self.save_format)
        distributed.barrier()  # All processes look for it there.

    def close(self) -> None:
        """Remove what was kept to go on from: the run is complete."""
        distributed.barrier()  # Other processes may still read the layers there.
        if self.writes:
            clear(self.path)


def completed(path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run that has ended in a folder, None if there is none or it is not whole.

    asked: {flag: value} of now. Raises InputError if another version of this program wrote it, or if it was asked for
    something else. Removes what the run kept to go on from, if it was killed meanwhile.
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


def is_saved_model(path: Path) -> bool:
    """Return whether a folder holds what a run of this program has saved: configuration, weights and record."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = json.loads((path / RECORD).read_text())
        return "program" in record and (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))
    return False


def clear(path: Path) -> None:
    """Remove what a run kept to go on from; without run.json, which goes first, it is complete or has never begun."""
    folder = path / PROGRESS
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
