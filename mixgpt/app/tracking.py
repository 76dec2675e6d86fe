"""Logging to Weights & Biases. Whatever fails there gives a line of warning and never ends the run."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mixgpt.allocation.traces import Traces
from mixgpt.app.settings import Settings
from mixgpt.common import distributed, errors
from mixgpt.evaluation.measures import MatrixSparsity, total_sparsity
from mixgpt.modeling.experts import kind_of
from mixgpt.pruning.targets import Outcome, Target

Key = tuple[int, str]  # (layer, name)


def _guarded(method: Callable) -> Callable:
    """Make a method of `Tracker` do nothing unless it logs, and stop logging if the client fails."""
    def guarded(self: "Tracker", *arguments: Any) -> None:
        try:
            if self.logs:
                method(self, *arguments)
        except Exception as error:  # It may be missing, refuse a variable, find no room or no server.
            if errors.is_out_of_memory(error):
                raise
            self.logs = False
            print(f"warning  W&B: {errors.one_line(error).rstrip('.'):.300}; going on without it", flush=True)

    return guarded


class Tracker(contextlib.AbstractContextManager):
    """A W&B run, as a context manager that ends it, unless a caller has begun it."""

    logs = True  # It is False once the client has failed.

    @_guarded
    def __init__(self, settings: Settings, record: dict[str, Any], method: str) -> None:
        """Begin to log in the first process if the settings ask for it. record, method: as far as they are known."""
        self.logs = settings.log_wandb and distributed.rank() == 0
        if not self.logs:
            return
        import wandb
        self.wandb, self.own = wandb, wandb.run is None
        options = {"config": {**record["settings"], **record, "method": method}, "project": settings.wandb_project,
                   "name": settings.wandb_name, "group": settings.wandb_group,
                   "settings": wandb.Settings(silent=settings.quiet)}
        try:
            self.run = wandb.run or wandb.init(**options)  # A second one would end the caller's.
        except (wandb.errors.UsageError, wandb.errors.CommError):  # It is logged out, or gets no answer.
            self.run = wandb.init(**options, mode="offline")
            print(f"warning  W&B: not online; upload the run with: wandb sync {Path(self.run.dir).parent}", flush=True)
        if not self.own:
            self.run.config.update(options["config"], allow_val_change=True)
        for metrics in ("layers/*", "error/*", "sparsity/*"):
            self.run.define_metric(metrics, step_metric="layer")

    @_guarded
    def plan(self, traces: Traces, plan: dict[Key, Target]) -> None:
        """Log `Traces` and {(layer, name): Target} as a table and a picture."""
        from mixgpt.app import plots  # It imports matplotlib.
        sensitivity, deviations = traces.sensitivity, traces.sensitivity_errors  # Each access computes them.
        rows = [[*key, sensitivity[key], deviations[key], rank, plan[key].sparsity]
                for rank, key in enumerate(sorted(plan, key=sensitivity.__getitem__, reverse=True), start=1)]
        columns = ["layer", "matrix", "trace per weight", "standard error", "rank", "sparsity assigned"]
        self.run.log({"plan/matrices": self.wandb.Table(columns=columns, data=rows),
                      "plan/heat_map": self.wandb.Image(Image.open(io.BytesIO(plots.draw(plan, traces))))})

    @_guarded
    def layer(self, index: int, counted: list[MatrixSparsity], outcomes: dict[Key, Outcome], start: float) -> None:
        """Log a finished layer: its `MatrixSparsity`s, {(layer, name): Outcome}, and the time since `start`."""
        frame = pd.DataFrame({"error": [outcomes.get((m.layer, m.name), Outcome()).error for m in counted],
                              "sparsity": [m.zeros / m.numel for m in counted]}, dtype=float)
        kinds = [kind_of(m.name).replace(".", "/") for m in counted]  # W&B's summary nests at dots.
        point = {"layer": index, "layers/seconds": time.perf_counter() - start,
                 "layers/sparsity": total_sparsity(counted), "layers/error": frame["error"].mean()}
        means = frame.groupby(kinds).mean().unstack()
        point |= {f"{metric}/{kind}": mean for (metric, kind), mean in means.items()}
        self.run.log({name: value for name, value in point.items() if value == value})  # No error is NaN.

    @_guarded
    def result(self, record: dict[str, Any], method: str) -> None:
        """Log the record of the run: every matrix as a table, all else as summary numbers."""
        matrices = pd.DataFrame(record["matrices"]).drop(columns="shape", errors="ignore")
        nested = {kind if model == method else f"{model}_{kind}": values for kind in ("perplexity", "distance", "tasks")
                  for model, values in record.get(kind, {}).items()}
        scores, = pd.json_normalize(nested, sep="/").to_dict("records")
        self.run.log({"matrices": self.wandb.Table(dataframe=matrices)} | scores)
        facts = {name: record[name] for name in ("sparsity", "peak_memory", "disk") if name in record}
        seconds = record["seconds"] | {"total": sum(record["seconds"].values())}
        self.run.summary.update(facts | {"method": method, "seconds": seconds})

    @_guarded
    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            self.run.summary["failed"] = errors.one_line(error)
        if self.own:
            self.run.finish(exit_code=errors.status_of(error) if error else 0)
