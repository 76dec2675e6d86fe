"""Traces of all matrices of a model with standard errors, computed once and cached in a file."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixgpt.allocation import backward
from mixgpt.common import distributed, program, progress
from mixgpt.common.choices import ESTIMATORS
from mixgpt.common.errors import InputError, reading
from mixgpt.common.files import cache_folder, check_outputs, write_output
from mixgpt.modeling.linears import Key
from mixgpt.modeling.running import StreamedModel
from mixgpt.modeling.streaming import digest, fingerprint
from mixgpt.pruning.targets import select

FLAG = "--sensitivity-file"
STABLE = 0.8  # A ranking whose split-half correlation is lower is called unstable.


@dataclass(frozen=True)
class Traces:
    """Estimates of Tr ∇²_W L for every matrix from each of N calibration sequences."""

    estimator: str  # A name in choices.ESTIMATORS.
    shapes: dict[Key, tuple[int, int]]  # (out, in)
    samples: Tensor  # (N, matrices), float64

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([out * columns for out, columns in self.shapes.values()], dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.samples.mean(dim=0)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean over sequences; NaN for one sequence."""
        if len(self.samples) < 2:
            return torch.full_like(self.mean, float("nan"))
        return self.samples.std(dim=0) / len(self.samples) ** 0.5

    @property
    def sensitivity(self) -> dict[Key, float]:
        """Trace per weight, {(layer, name): Tr / n}: MixGPT (arXiv 2310.09499), section 2.3.1."""
        return dict(zip(self.shapes, (self.mean / self.sizes).tolist(), strict=True))

    @property
    def sensitivity_errors(self) -> dict[Key, float]:
        """Standard errors of `sensitivity`, {(layer, name): that of Tr / n}."""
        return dict(zip(self.shapes, (self.standard_error / self.sizes).tolist(), strict=True))

    @property
    def split_half_correlation(self) -> float:
        """Spearman rank correlation of Tr / n between even and odd sequences; NaN for one sequence."""
        if len(self.samples) < 2 or len(self.shapes) < 2:
            return float("nan")
        ranks = torch.stack([(self.samples[half::2].mean(dim=0) / self.sizes).argsort().argsort().double()
                             for half in (0, 1)])
        return torch.corrcoef(ranks)[0, 1].item()

    def verdict(self) -> str:
        """Return a line on how far the ranking can be trusted."""
        relative = (self.standard_error / self.mean).abs().nanmedian().item()  # A matrix without use gives NaN.
        return (f"traces   {self.estimator}, {len(self.samples)} sequences: median standard error {relative:.1%} of "
                f"the trace, {int((self.mean < 0).sum())} negative, split-half rank correlation "
                f"{self.split_half_correlation:.3f}")

    def warning(self) -> str:
        """Return a line on which flag to raise if the ranking cannot be trusted; empty if it can."""
        if self.split_half_correlation >= STABLE:
            return ""
        others = "" if self.estimator == "fisher" else ", or take --sensitivity fisher"
        return (f"warning  the ranking is not stable (rank correlation below {STABLE}): raise --nsamples or "
                f"--nprobes{others}")


def read(path: str | Path, shapes: dict[Key, tuple[int, int]], estimator: str) -> dict | None:
    """Return the content of a file of traces, None if there is none. Raises InputError if it does not fit the model."""
    if not Path(path).exists():
        return None
    with reading(f"{FLAG} {path}: is not a file of traces"):
        content = json.loads(Path(path).read_text())
        stored = {(row["layer"], row["name"]): tuple(row["shape"]) for row in content["matrices"]}
        kind, _, sequences = (content["key"][name] for name in ("estimator", "weights", "sequences"))
        samples = torch.tensor(content["samples"], dtype=torch.float64)
        if samples.shape[1:] != (len(stored),) or not 0 < len(samples) <= sequences or not samples.isfinite().all():
            raise ValueError(f"samples {tuple(samples.shape)} of {len(stored)} matrices, {sequences} sequences")
    for matrix in {**shapes, **stored}:
        if shapes.get(matrix) != stored.get(matrix):
            raise InputError(f"{FLAG} {path}: does not match the model: layer {matrix[0]} {matrix[1]} is "
                             f"{stored.get(matrix, 'missing')} there, {shapes.get(matrix, 'missing')} in the model")
    if kind != estimator:
        raise InputError(f"{FLAG} {path}: contains {kind} traces; give --sensitivity {kind}")
    return content | {"samples": samples}


def hessian_traces(streamed: StreamedModel, matrices: Sequence[Key], tokens: Tensor, estimator: str, seed: int = 0,
                   nprobes: int = 1, previous: Tensor | None = None,
                   save: Callable[[Tensor], None] | None = None) -> Tensor:
    """Estimate Tr ∇²_W of the mean cross-entropy for each matrix W, separately from each sequence.

    previous: rows (n, matrices) from an interrupted call. save: called with the rows so far after every chunk.
    """
    (N, T), estimate, rows = tokens.shape, ESTIMATORS[estimator].load(), [] if previous is None else list(previous)
    # There are 2 kinds of states, because an estimator may keep tangents.
    limit = backward.SAVED_AFTER if streamed.device.type == "cpu" else math.inf
    size, place = backward.chunk_size(streamed, -(-(N - len(rows)) // distributed.world()), T, 2, limit)
    total = (N - len(rows)) * nprobes * 2 * len(streamed.layers)
    with progress.bar(total=total, title=estimator, unit="step") as bar:
        while len(rows) < N:
            together = range(len(rows), min(len(rows) + size * distributed.world(), N))
            numbers = together[distributed.share(len(together))]
            sums = torch.zeros(len(numbers), len(matrices), dtype=torch.float64)
            for probe in range(nprobes if numbers else 0):
                sums += estimate(backward.Chunk(streamed, matrices, tokens[numbers.start:numbers.stop], place, bar),
                                 [(seed, n, probe) for n in numbers])
            rows.extend(torch.cat(distributed.all_gather_object(sums)) / nprobes / (T - 1))
            if save:
                save(torch.stack(rows))
    return torch.stack(rows)


def load_or_compute(streamed: StreamedModel, tokens: Tensor, estimator: str, seed: int = 0, nprobes: int = 1,
                    path: str | Path | None = None) -> tuple[Traces, Path]:
    """Return `Traces` of all matrices and their file (default: in the cache), read from it, or computed and saved."""
    model, shapes = streamed.model, select(streamed.model)
    key = {"weights": fingerprint(model), "tokens": digest(tokens), "sequences": len(tokens), "estimator": estimator,
           "seed": seed, "nprobes": nprobes, "dtype": str(model.dtype).removeprefix("torch.")}
    digits = hashlib.sha256(json.dumps([key, program.signature()["program"]]).encode()).hexdigest()[:16]
    file = Path(path or cache_folder() / f"traces-{digits}.json")
    stored = distributed.broadcast_object(read(file, shapes, estimator))  # Other machines have caches of their own.
    if stored and stored["key"]["weights"] != key["weights"]:
        raise InputError(f"{FLAG} {file}: was computed from different weights")  # Other tokens or seeds will do.
    if stored and len(stored["samples"]) == stored["key"]["sequences"]:
        return Traces(estimator, shapes, stored["samples"]), file
    if stored and stored["key"] != key:
        raise InputError(f"{FLAG} {file}: is incomplete and was started with different data or settings")
    check_outputs({FLAG: file}, overwrite=True)

    def save(samples: Tensor) -> None:
        for (layer, name), finite in zip(shapes, samples.isfinite().all(dim=0).tolist(), strict=True):
            if not finite:
                raise InputError(f"layer {layer} {name}: its trace is NaN or inf; try --dtype float32")
        if distributed.rank() == 0:
            traces = Traces(estimator, shapes, samples)
            rows = [{"layer": layer, "name": name, "shape": shape, "trace": mean, "standard_error": error}
                    for ((layer, name), shape), mean, error in zip(
                        shapes.items(), traces.mean.tolist(), traces.standard_error.tolist(), strict=True)]
            content = {"key": key, "matrices": rows, "samples": samples.tolist()}
            write_output(FLAG, file, json.dumps(content) + "\n")

    samples = hessian_traces(streamed, list(shapes), tokens, estimator, seed, nprobes, stored and stored["samples"],
                             save)
    return Traces(estimator, shapes, samples), file
