"""Estimate the seconds of cells of paper.py from counted arithmetic, at the rate of the cells that were measured.

Counted are the products of linears with tokens in every pass, Hessians, and what a solver does with them; attention,
disk and texts are not. Before anything was measured, the rate is that of a large matrix product on the device, which no
run reaches.
"""

from dataclasses import dataclass

import torch
from bench import rate

from mixgpt.app.choices import ALLOCATIONS
from mixgpt.common.runtime import choose_device

BASIS = ("counted arithmetic of linears and solvers at the rate of the model's measured cells, or where there are none "
         "of a matrix product on this device; tasks are not counted")
PASSES = 2  # through a layer that calibrates it: for its Hessians and for the next layer's inputs
ADMM = 16  # times the walk's operations: 12 iterations and 4 steps
BACKWARD = {"fisher": 4, "hutchinson": 12}  # forwards that sensitivities take on a sequence


@dataclass(frozen=True)
class Size:
    """What the arithmetic of a cell depends on besides its settings."""

    shapes: tuple  # (out, in) of each matrix
    head: int  # weights of the output matrix
    seqlen: int
    tested: int  # tokens of the test sets

    @property
    def forward(self):
        """Operations of the linears for a token."""
        return 2 * sum(out * columns for out, columns in self.shapes)


def operations(settings, size):
    """Count the floating-point operations of a run, but for sensitivities."""
    drawn, further, trained = (number * size.seqlen for number in (settings.nsamples, *settings.written()))
    tokens = drawn + further
    total = (size.forward + 2 * size.head) * (size.tested + further + trained)
    total += (3 * size.forward + 8 * size.head) * trained
    if settings.calibrates:
        times = ADMM if settings.solver == "admm" else 1
        total += PASSES * size.forward * tokens
        total += sum(columns**2 * tokens + times * out * columns**2 + columns**3 for out, columns in size.shapes)
    if settings.weighs:
        total += BACKWARD["fisher"] * (size.forward + 2 * size.head) * drawn / 2  # of every second sequence
    if settings.spreads and not settings.mixed and not ALLOCATIONS[settings.sparsity_way].by_loss:
        total += size.forward * drawn  # the dense model's activations
    return total


def of_sensitivities(settings, size):
    """Count the floating-point operations of sensitivities."""
    return BACKWARD[settings.sensitivity] * (size.forward + 2 * size.head) * (
        settings.nsamples * size.seqlen * settings.nprobes)


def estimate(settings, size, method, done, ranks):
    """Return the seconds that a cell of a method probably takes.

    done: (method, operations, seconds) of the model's cells that were measured; those of the same method count alone
    if there are any. ranks: whether it has to compute sensitivities.
    """
    alike = [each for each in done if each[0] == method] or done
    if alike:
        per_second = sum(count for _, count, _ in alike) / sum(seconds for *_, seconds in alike)
    else:
        per_second = rate(choose_device(settings.device), getattr(torch, settings.dtype, torch.float32), 1024)
    return (operations(settings, size) + (of_sensitivities(settings, size) if ranks else 0)) / per_second
