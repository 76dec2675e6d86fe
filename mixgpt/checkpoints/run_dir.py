"""The folder of --save: its lock, what an interrupted run has kept there, and the finished checkpoint.

Until the run has ended, its subdirectory `progress` holds, beside the `LayerFiles`,

    run.json                  what identifies the run, and the choices that it has made, see `RunDir.kept`
    NAME-RANK.safetensors     tensors that belong to a choice: gradients, states of the dense model
"""

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.common import distributed
from mixgpt.common.choices import FORMATS, PROGRESS, RECORD, is_interrupted_run
from mixgpt.common.errors import InputError, reading
from mixgpt.common.program import __version__, check_signature, signature
from modelutils import whole

PARTIAL = ("*.partial", ".tmp*")  # files that a killed run was writing


class RunDir(LayerFiles):
    """The folder of --save. As a context manager it is locked, and removed if nothing in it is worth going on from."""

    def __init__(self, path, save_format="dense", nbytes=0, resume=True, overwrite=False):
        """Lock the folder in the first process, the one that writes.

        nbytes: of finished layers and result together. resume: accept an interrupted run. overwrite: accept a saved
        model, which `open` removes. Raises InputError for a folder that is not empty, not writable, in use by another
        run or on a full disk, and leaves nothing behind.
        """
        super().__init__(Path(path) / PROGRESS, f"--save {path}", "free some space and continue with --resume")
        self.path, self.save_format, self.run = Path(path), save_format, {}  # run: content of run.json
        if self.writes:
            self.is_new, self.overwrites = not self.path.exists(), overwrite and (self.path / RECORD).is_file()
            self._check(nbytes)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = (self.folder / "lock").open("a")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.place}: is in use by another run") from error
            except OSError as error:
                raise InputError(f"{self.place}: cannot be used ({error.strerror}); name another folder") from error
            if is_interrupted_run(self.path) and not resume:
                self.lock.close()
                raise InputError(f"{self.place}: holds an interrupted run; continue it with --resume, or remove the "
                                 "folder")

    def _check(self, nbytes):
        # what a run that never started has left
        unused = all(file == self.folder or file.parent == self.folder and (
            file.name == "lock" or file.suffix == ".partial") for file in self.path.rglob("*"))
        if not (unused or is_interrupted_run(self.path) or self.overwrites):
            raise InputError(f"{self.place}: exists and is not an empty folder; name another one, or give --overwrite "
                             "to replace a saved model")
        free = shutil.disk_usage(next(place for place in self.folder.absolute().parents if place.exists())).free
        needed = nbytes - sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))
        if free < needed:
            raise InputError(f"{self.place}: finished layers and the result need {needed / 1e9:.3f} GB, "
                             f"{free / 1e9:.3f} GB are free there")

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.writes:
            kept = any(self.folder.glob("*.safetensors")) or any(file != self.folder for file in self.path.glob("*"))
            if not (is_interrupted_run(self.path) and kept):
                clear(self.path)
                if self.is_new and not any(self.path.glob("*")):
                    self.path.rmdir()
            self.lock.close()

    def open(self, model, identity):
        """Start a run, or go on with the one interrupted here. identity: what both must share, {flag: value}.

        Raises InputError if run.json cannot be read, or is that of another run.
        """
        identity = {"version of this program": __version__} | identity
        if self.writes and is_interrupted_run(self.path):
            with self._reading(self.folder / "run.json"):
                self.run = json.loads((self.folder / "run.json").read_text())
            check_signature(self.run, f"--resume: the run in {self.path}")
            before = self.run["identity"]
            for flag in before | identity:
                if before.get(flag) != identity.get(flag):
                    raise InputError(f"--resume: {flag} was {before.get(flag)} in the interrupted run in {self.path}, "
                                     f"now it is {identity.get(flag)}")
            for file in (file for pattern in PARTIAL for file in self.path.rglob(pattern)):
                file.unlink()
        elif self.writes:
            for entry in set(self.path.iterdir()) - {self.folder} if self.overwrites else ():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            self.run = signature() | {"identity": identity}
            self.write_json(self.folder / "run.json", self.run)
        self.run = distributed.broadcast_object(self.run)
        super().open(model)
        if isinstance(self.run.get("distilled"), dict):  # not a reason why there is no distilled model
            self.take_distilled()

    def _reading(self, file):
        return reading(f"--resume: {file} cannot be read; remove {self.path} to start over")

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
            self.write(file, tensors)
        distributed.barrier()  # all have written theirs
        self.keep(name, value)
        return value, tensors

    def keep(self, name, value):
        """Keep a JSON-able value under a name."""
        self.run[name] = value
        if self.writes:
            self.write_json(self.folder / "run.json", self.run)

    def write_record(self, record):
        """Write the record of the run, in the first process."""
        if self.writes:
            self.write_json(self.path / RECORD, record)

    def write_checkpoint(self, tokenizer, grids):
        """Write the final checkpoint; what makes it loadable comes last.

        grids: {name of a linear: quant.Grid}. Formats other than dense load the whole model into memory.
        """
        if self.writes:
            with self.disk_errors("the tokenizer"):
                tokenizer.save_pretrained(self.path)
                if getattr(self.model.config, "auto_map", None):  # for others to load: it is never run here
                    for file in Path(self.model.config.name_or_path).glob("*.py"):
                        shutil.copyfile(file, self.path / file.name)
            with self.disk_errors("the model"):
                save_format = FORMATS[self.save_format]
                loaded = contextlib.nullcontext() if save_format.streams else whole(self.model, torch.device("cpu"))
                with loaded:
                    save_format.load()(self.path, self.model, grids)
        distributed.barrier()  # all read it

    def close(self):
        """Remove what was kept to go on from: the run is complete."""
        distributed.barrier()  # others may still compare the layers there with the saved model
        if self.writes:
            clear(self.path)


def clear(path):
    """Remove what a run kept to go on from. What comes first marks it as complete, or as never begun."""
    folder = Path(path) / PROGRESS
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
