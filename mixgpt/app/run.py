"""A run in progress: its inputs, what it has made of them so far, and how it uses memory."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.app import tracking
from mixgpt.app.settings import IN_MEMORY, Settings
from mixgpt.checkpoints import run_dir
from mixgpt.common import distributed, memory, runtime
from mixgpt.common.texts import OWN, counts_of, text_for
from mixgpt.datautils import OWN_TOKENS
from mixgpt.modeling import decoder
from mixgpt.modeling.linears import Key
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill, needs
from mixgpt.pruning.masks import Masks
from mixgpt.pruning.targets import Target

Value = TypeVar("Value")
LATER: Any = None  # `opening.open_run` sets these fields before anything reads them.


@dataclass
class Run:
    """A run in progress."""

    settings: Settings  # The defaults of --seqlen and --bos are replaced by what they stand for.
    device: torch.device
    clock: runtime.Clock
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    selected: dict[Key, tuple[int, int]]  # {(layer, name): (out, in)} are the matrices to change.
    uncalled: list[str]  # Linears of these names are not called as modules, and stay dense.
    widening: float  # A token between two layers has this many times the bytes of its hidden state.
    model: PreTrainedModel  # It is on meta until the run is opened, unless it is in memory already.
    calibration: torch.Tensor = LATER  # (N, T); None if nothing is calibrated
    further: torch.Tensor = LATER  # (n, T): the first ones are for the Hessians alone, the others for distillation.
    masks: Masks | None = None  # That of --mask-from, if given.
    tests: dict[str, torch.Tensor] = field(default_factory=dict)  # {test set: tokens (n, T)}
    sources: dict[str, dict] = field(default_factory=dict)  # They say where the texts come from.
    score_tasks: Callable[[PreTrainedModel, int], dict] | None = None  # It takes a model and the batch size.
    folder: run_dir.RunDir | None = None  # It is that of --save, else a temporary one if the weights are on disk.
    record: dict[str, Any] = field(default_factory=dict)  # mixgpt.json will hold it; each step adds its part.
    tracker: tracking.Tracker = LATER
    memory_plan: memory.MemoryPlan = LATER  # Pruning follows it.
    ways: list[needs.Way] = LATER  # to distil the pruned model, as far as there is room

    @property
    def seqlen(self) -> int:
        """The tokens of a sequence."""
        return self.settings.seqlen  # ty: ignore[invalid-explicit-return]  # None is a default, which `check` replaces.

    @property
    def method(self) -> str:
        """The name of what has happened, in tables and records."""
        return self.settings.method(distilled=not isinstance(self.record.get("distilled"), str))

    @property
    def target(self) -> Target:
        """The target of all matrices together."""
        n, m = self.settings.prunen, self.settings.prunem
        return Target(n / m, n, m) if m else Target(self.settings.sparsity)

    @property
    def distills(self) -> bool:
        """Whether the pruned model is distilled at the end."""
        return bool(self.ways)

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype of the weights in memory, "auto" for that on disk."""
        return runtime.choose_dtype(self.settings.dtype, self.config, self.device)

    @property
    def stages(self) -> list[str]:
        """The stages of the run, in their order."""
        settings = self.settings
        evaluates, compresses = bool(settings.eval or settings.tasks), settings.compresses
        distills = settings.distill > 0 if self.ways is LATER else self.distills  # Own text is written before.
        return [stage for stage, planned in {
            "own text": bool(self.own_tokens),
            "dense model": settings.dense and settings.method() != "dense" and evaluates,
            "reference": distills,
            "experts": settings.experts > 0,
            "sensitivity": compresses and settings.allocation.ranks,
            "gradients": compresses and settings.needs_gradients,
            "pruning" if settings.prunes else "rounding": compresses,
            "distillation": distills,
            "quantization": distills and settings.quantizes_last,
            "saving": settings.save is not None,
            "evaluation": evaluates}.items() if planned]

    @property
    def hidden_bytes(self) -> int:
        """The bytes of the hidden states of all calibration sequences of this process, between two layers."""
        settings, sets = self.settings, 1 + (self.settings.target == "dense")
        tokens = self.seqlen * (settings.nsamples + sum(settings.extra_counts)) // distributed.world()
        return int(sets * tokens * self.token_bytes)

    @property
    def draws(self) -> dict[str, tuple[int, int, int | str]]:
        """The sequences that are drawn, {what for: (their number, tokens of each, seed)}.

        Those beside the calibration sequences are short: many short ones differ more than a few long ones.
        """
        T, seed, counts = self.seqlen, self.settings.seed, self.settings.extra_counts
        short = distill.piece_length(T)
        return {"calibration": (self.settings.nsamples, T, seed)} | {
            what: (count * T // short, short, f"{seed}, {what}")
            for what, count in zip(("further", "distillation"), counts, strict=True)}

    @property
    def own_tokens(self) -> dict[str, int]:
        """How many tokens the dense model writes itself, {"dataset" or "--eval": their number}, without zeros."""
        settings, counts = self.settings, {"--eval": OWN_TOKENS * (OWN in self.settings.eval)}
        if settings.needs_calibration and settings.dataset != IN_MEMORY:
            counts["dataset"] = sum(counts_of(text_for(what, settings.dataset), n).get(OWN, 0) * tokens
                                    for what, (n, tokens, _) in self.draws.items() if n)
        return {argument: count for argument, count in counts.items() if count}

    @property
    def disk_bytes(self) -> int:
        """The bytes of finished layers, and of the result if it is saved, in the folder of --save or in TMPDIR."""
        settings, all_weights = self.settings, sum(weight.nbytes for weight in self.model.parameters())
        if settings.save:
            return all_weights * (1 + bool(self.selected) + settings.quantizes_last)
        layers = sum(weight.nbytes for layer in decoder.layers_of(self.model) for weight in layer.parameters())
        return layers * (1 + (settings.distill > 0)) * bool(self.selected)

    @property
    def disk_left(self) -> float:
        """The bytes that are free beside `disk_bytes`, 0 if that disk is memory, too."""
        free, in_memory = memory.room(self.settings.save or tempfile.gettempdir())
        return 0 if in_memory else max(free - self.disk_bytes, 0)

    @property
    def token_bytes(self) -> float:
        """The bytes of a token between two layers."""
        dtype = self.model.dtype if self.dtype == "auto" else self.dtype
        return self.widening * self.config.hidden_size * dtype.itemsize

    def begin(self, stage: str) -> None:
        """Say which of how many stages begins."""
        stages = self.stages
        self.log(f"stage    {stages.index(stage) + 1} of {len(stages)}: {stage}")

    def streamed(self, plan: memory.MemoryPlan) -> StreamedModel:
        """Return the model as it runs under a MemoryPlan."""
        return StreamedModel(self.model, self.device, plan.batch_size, self.clock, plan.on_host)

    def distilling(self, plan: memory.MemoryPlan) -> tuple[StreamedModel, torch.Tensor]:
        """Return the model as it distils under a MemoryPlan, with as many tokens in a batch, and its pieces (m, t)."""
        tokens = distill.pieces(self.further[self.settings.extra_counts[0]:])
        size = plan.batch_size * (self.seqlen // tokens.shape[1])
        return self.streamed(replace(plan, batch_size=size)), tokens

    def retry(self, step: Callable[[memory.MemoryPlan], Value], on_host: bool = True) -> Value:
        """Return step(MemoryPlan), with less memory if a GPU's runs out. on_host: whether hidden states are."""
        return memory.retry_with_less_memory(memory.MemoryPlan(self.settings.batch_size, on_host), step)

    def keep(self, name: str, make: Callable[[], Value]) -> Value:
        """Return the JSON-able make(), or what it was in the interrupted run; see `RunDir.keep`."""
        return self.keep_tensors(name, lambda: (make(), {}))[0]

    def keep_tensors(self, name: str, make: Callable[[], tuple[Any, dict[str, torch.Tensor]]]
                     ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return make(), a JSON-able value and tensors, or what they were in the interrupted run."""
        return self.folder.keep(name, make) if self.settings.save else make()

    def log(self, text: str) -> None:
        """Print text unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)
