"""The options of `mixgpt.prune` and `mixgpt.evaluate`, for type checkers and editors; `Settings` says what they do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class Evaluation(TypedDict, total=False):
    """The options of a run that measures a model as it is."""

    seqlen: int | None
    bos: str
    data_dir: str | Path | None
    eval: Sequence[str]
    eval_limit: int | None
    tasks: Sequence[str]
    tasks_dir: str | Path | None
    batch_size: int
    device: "str | torch.device | None"
    dtype: "str | torch.dtype"
    record: str | Path | None
    overwrite: bool
    log_wandb: bool
    wandb_project: str | None
    wandb_name: str | None
    wandb_group: str | None
    quiet: bool
    dry_run: bool
    device_memory: str | None


class Options(Evaluation, total=False):
    """The options of a run."""

    sparsity: float
    prunen: int
    prunem: int
    minlayer: int
    maxlayer: int
    prune_only: str
    invert: bool
    experts: float
    preset: str | None
    effort: float
    sparsity_way: str
    alpha: float
    sensitivity: str
    nprobes: int
    sensitivity_file: str | Path | None
    gmp: bool
    solver: str
    target: str
    rotate: bool
    mask_from: str | None
    saliency: str
    blocksize: int
    percdamp: float
    true_sequential: bool
    wbits: int
    grid: str
    groupsize: int
    sym: bool
    mse: bool
    act_order: bool
    nearest: bool
    nsamples: int
    extra: float
    distill: float
    seed: int
    dense: bool
    save: str | Path | None
    save_format: str
    resume: bool
    plot: str | Path | None
