"""Files of finished layers, which a thread writes while the next layer is pruned."""

import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixgpt.checkpoints import shards
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.files import os_errors
from mixgpt.modeling import streaming
from mixgpt.modeling.streaming import Place

PARTIAL = ("*.partial", ".tmp*")  # files that a killed run was writing


class LayerFiles:
    """Weights of finished layers in a temporary folder, for a run without --save; the model reads them from there.

    The thread has one layer at a time: `finish` waits for the one before, and raises what kept that from being written.
    As a context manager it waits for the thread, so that the folder can be removed.
    """

    def __init__(self, path):
        """path: the temporary folder, which exists."""
        self.path = self.folder = Path(path)
        self.place = f"TMPDIR {self.path.parent}"
        self.advice = "free some space, or set TMPDIR to a folder on a larger disk"
        self.writes = distributed.rank() == 0
        self._thread, self._writing = ThreadPoolExecutor(1), None
        self.distilled = None  # what `finish` was told about the finished layers, if they are distilled

    def __enter__(self):
        return self

    def __exit__(self, _, error, trace):
        self._thread.shutdown()
        if error is None:
            self._wait()

    def start(self, model, family):
        """Take the layers of a model, whose weights are on disk."""
        self.model, self.family, self.layers = model, family, family.layers_of(model)
        self.sources = [source and dict(source.places) for source in map(source_of, self.layers)]

    def begin(self, count, states=None):
        """Let all layers be those of the dense model, for the first attempt at a run or another one.

        Returns, as `RunDir.begin`, the first unfinished layer and the outcomes of those before: 0 and none.
        """
        self._wait()
        self._restore_sources()
        return 0, {}

    def _restore_sources(self):
        """Let all layers on disk be those of the dense model, not what this process has pruned."""
        for index, places in enumerate(self.sources):
            if places is not None:
                self._point(index, places)

    def finish(self, index, layer, outcomes, states=None, distilled=None):
        """Let the thread write the weights of a finished layer, which is on the device. The rest is not needed."""
        self._wait()
        if self.writes:
            self._hand_over(self._write_weights, index, self._leaving(index, layer))
        self._take(index)

    def settle(self):
        """Wait until all is written that was finished; the model reads it from there. Raises what prevented it."""
        self._wait()
        distributed.barrier()  # the first process writes, all read

    def _hand_over(self, work, *given):
        """Let the thread do work(*given)."""
        self._writing = self._thread.submit(work, *given)

    def _wait(self):
        """Wait for the thread. Raises what ended its work."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _leaving(self, index, layer):
        """Return a function by which the thread gets {name in the model: tensor} of a layer on the host."""
        return streaming.leaving({f"{self.family.layers}.{index}.{name}": tensor
                                  for name, tensor in layer.state_dict().items()})

    def _write_weights(self, index, arrived):
        tensors = arrived()
        with self._room(self._layer(index).name, shards.size(tensors)):
            streaming.save(self._layer(index), tensors, tensors.get)

    def _layer(self, index):
        return self.folder / f"layer-{index:05d}.safetensors"

    def _names(self, index):
        return [f"{self.family.layers}.{index}.{name}" for name in self.layers[index].state_dict()]

    def _places(self, index):
        """Return where a finished layer's tensors are, {name in the model: Place}."""
        return {name: Place(str(self._layer(index)), name) for name in self._names(index)}

    def _take(self, index):
        """Point a layer on disk at the files of the finished one."""
        prefix = f"{self.family.layers}.{index}."
        self._point(index, {name.removeprefix(prefix): place for name, place in self._places(index).items()})

    def _point(self, index, places):
        """Let a layer on disk read its tensors from places {name: Place}."""
        self.layers[index].source.places = dict(places)
        self.model.source.places |= {f"{self.family.layers}.{index}.{name}": place for name, place in places.items()}

    @contextlib.contextmanager
    def _room(self, name, nbytes=None):
        """Turn a full, unwritable or missing disk into a one-line InputError, leaving no partial file."""
        try:
            with os_errors():
                yield
        except OSError as error:
            if not self.folder.is_dir():
                raise self._gone() from error
            for file in (file for pattern in PARTIAL for file in self.path.rglob(pattern)):
                file.unlink(missing_ok=True)
            need = "cannot be written" if nbytes is None else f"needs {nbytes / 1e9:.3f} GB"
            free = shutil.disk_usage(self.path).free
            raise InputError(f"{self.place}: {name} {need}, {free / 1e9:.3f} GB are free ({error.strerror or error}); "
                             f"{self.advice}") from error

    def _gone(self):
        return InputError(f"{self.place}: the folder was removed while the run went on; start again")


def source_of(module):
    """Return where a module's tensors are on disk, a streaming.Source, or None if they are in memory."""
    return getattr(module, "source", None)
