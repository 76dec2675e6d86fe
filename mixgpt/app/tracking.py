"""Optional logging to Weights & Biases; failures there cause a warning and never stop the run."""

import contextlib
import functools
import io
import os
from pathlib import Path

from PIL import Image

from mixgpt.app.exit_status import status_of

PATIENCE = {"init_timeout": 30, "finish_timeout": 300}  # seconds to wait for an unresponsive server


def _guarded(method):
    """Make a method of `Tracker` a no-op without a W&B run, and drop the W&B run if the client fails."""
    @functools.wraps(method)
    def guarded(self, *arguments):
        if self.run is None:
            return
        try:
            method(self, *arguments)
        except Exception as error:  # any failure of the client, its process or its server
            _warn(f"{_first_line(error)}; going on without it; {self._upload()}")
            self.run = None
            with contextlib.suppress(Exception):  # or the client retries, with a traceback, when Python exits
                self.wandb.teardown(exit_code=1)

    return guarded


class Tracker:
    """A W&B run, as a context manager that marks it finished or failed. Without a run, methods do nothing."""

    def __init__(self, config, project=None, name=None, group=None):
        """Start a run. config: settings and environment, None: no run. Other Nones are left to wandb's env variables.

        Without a login or a reachable server, the run is kept on disk.
        """
        self.run = None
        if config is None:
            return
        try:
            import wandb
        except ImportError:
            _warn("wandb is not installed; going on without it (pip install wandb)")
            return
        self.wandb = wandb
        asked = {"config": config, "project": project, "name": name, "group": group}
        try:
            self._begin(asked)
        except Exception as error:  # as above
            self._begin_offline(asked, error)

    def _begin(self, asked):
        patience = {name: os.environ.get(f"WANDB_{name.upper()}", seconds) for name, seconds in PATIENCE.items()}
        self.run = self.wandb.init(**asked, settings=self.wandb.Settings(silent=True, **patience))
        for group in ("layers", "error", "sparsity"):
            self.run.define_metric(f"{group}/*", step_metric="layer")

    def _begin_offline(self, asked, reason):
        if _refused_variable(reason):  # without its variables, wandb would write to other folders
            self.run = None
            _warn(f"{_first_line(reason)}; going on without it")
            return
        try:
            self._begin(asked | {"mode": "offline"})
        except Exception as error:  # only the disk can fail
            self.run = None
            _warn(f"{_first_line(reason)}; {_first_line(error)}; going on without it")
        else:
            _warn(f"{_first_line(reason)}; the run is kept {self.place}")

    @property
    def place(self):
        """Return a line on where the run can be seen, None without a run."""
        if self.run is None:
            return None
        if self.run.disabled:
            return "disabled by WANDB_MODE"
        return f"on disk; {self._upload()}" if self.run.offline else self.run.url

    def _upload(self):
        return f"upload it with: wandb sync {Path(self.run.dir).parent}"

    @_guarded
    def plan(self, traces, plan):
        """Log `Traces` and {(layer, name): Target} as a table and a picture."""
        from mixgpt.app import plots  # imports matplotlib
        sensitivity = traces.sensitivity
        errors = dict(zip(traces.shapes, (traces.standard_error / traces.sizes).tolist(), strict=True))
        ranked = sorted(plan, key=sensitivity.get, reverse=True)
        rows = [[layer, name, sensitivity[layer, name], errors[layer, name], rank, plan[layer, name].sparsity]
                for rank, (layer, name) in enumerate(ranked, start=1)]
        picture = io.BytesIO(plots.draw(plan, traces))
        columns = ["layer", "matrix", "trace per weight", "standard error", "rank", "sparsity assigned"]
        self.run.log({"plan/matrices": self.wandb.Table(columns=columns, data=rows),
                      "plan/heat_map": self.wandb.Image(Image.open(picture))})

    @_guarded
    def layer(self, index, outcomes, seconds, counted):
        """Log a finished layer: {(layer, name): Outcome}, and the `MatrixSparsity` of all its matrices."""
        from mixgpt.app import plots
        point = {"layer": index, "layers/seconds": seconds,
                 "layers/sparsity": sum(m.zeros for m in counted) / sum(m.numel for m in counted)}
        errors = {key: outcome.error for key, outcome in outcomes.items() if outcome.error is not None}
        if errors:
            point["layers/error"] = sum(errors.values()) / len(errors)
        sparsities = {(m.layer, m.name): m.zeros / m.numel for m in counted}
        for metric, values in (("error", errors), ("sparsity", sparsities)):
            point |= {f"{metric}/{_key(kind)}": value for (_, kind), value in plots.of_kinds(values).items()}
        self.run.log(point)

    @_guarded
    def result(self, record, method):
        """Log the record of the run: every matrix as a table, all else as summary numbers."""
        columns = list(dict.fromkeys(column for row in record["matrices"] for column in row if column != "shape"))
        rows = [[row.get(column) for column in columns] for row in record["matrices"]]
        self.run.log({"matrices": self.wandb.Table(columns=columns, data=rows)} | scores(record, method))
        seconds = record["seconds"]
        self.run.summary.update({
            "method": method, "sparsity": record["sparsity"],
            "seconds": seconds | {"total": sum(seconds.values())}, "peak_memory": record["peak_memory"],
            **({"disk": record["disk"]} if "disk" in record else {})})

    def __enter__(self):
        return self

    def __exit__(self, _, error, traceback):
        if isinstance(error, Exception):
            self._explain(error)
        self._finish(status_of(error))

    @_guarded
    def _explain(self, error):
        self.run.summary["failed"] = _first_line(error)

    @_guarded
    def _finish(self, status):
        self.run.finish(exit_code=status)


def scores(record, method):
    """Return the perplexities and task scores of a record by name; those of the dense model begin with dense_."""
    found = {}
    for quantity in ("perplexity", "tasks"):
        for model, values in record.get(quantity, {}).items():
            prefix = quantity if model == method else f"{model}_{quantity}"
            found |= {f"{prefix}/{key}": value for key, value in _flat(values)}
    return found


def _flat(values, above=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}/")
        else:
            yield above + key, value


def _key(name):
    return name.replace(".", "/")  # W&B's summary nests at dots


def _refused_variable(error):
    """Return what is wrong with a variable of the environment if an error is pydantic's about wandb's settings."""
    if not callable(getattr(error, "errors", None)):
        return ""
    first = error.errors()[0]
    return f"WANDB_{'_'.join(map(str, first['loc'])).upper()} {first['input']}: {first['msg']}"


def _first_line(error):
    if variable := _refused_variable(error):
        return variable
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _warn(text):
    print(f"warning  W&B: {text}", flush=True)
