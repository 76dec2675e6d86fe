"""Evaluate the model in memory as it is now, and compare a saved one with it."""

import torch

from mixgpt.checkpoints import load
from mixgpt.common.errors import VerificationError
from mixgpt.common.memory import MemoryPlan, retry_with_less_memory
from mixgpt.evaluation import semistructured
from mixgpt.evaluation.measures import logits, measure_weights, perplexity

PROBE = 128  # tokens on which the saved model is compared with the one in memory


def evaluate(current, method):
    """Add perplexities and task scores of the model as it is now to the record. method: "dense" or its name."""
    given, model = current.inputs, current.model

    def perplexities(plan):
        with current.clock.part("evaluation"):
            return {name: perplexity(model, given.family, tokens, plan.batch_size, given.device, name)
                    for name, tokens in given.tests.items()}

    def scores(plan):
        with current.clock.part("tasks"):
            return given.score_tasks(model, plan.batch_size)

    plan = MemoryPlan(current.settings.batch_size)
    current.record.setdefault("perplexity", {})[method] = retry_with_less_memory(current.settings, plan, perplexities)
    if given.score_tasks:
        current.record.setdefault("tasks", {})[method] = retry_with_less_memory(current.settings, plan, scores)


def compare_kernels(current):
    """Run the model on the GPU's kernels for 2:4 sparsity."""
    given = current.inputs
    current.record["semi_structured"] = retry_with_less_memory(
        current.settings, MemoryPlan(current.settings.batch_size),
        lambda plan: semistructured.compare(current.model, given.family, given.tests, plan.batch_size, given.device))


def verify(current, matrices, others):
    """Reload the saved model and compare it with the one in memory: zeros of every weight, logits of a few tokens."""
    given, folder = current.inputs, current.settings.save
    probe = next((tokens[:1, :PROBE] for tokens in (*given.tests.values(), given.calibration) if tokens is not None),
                 torch.arange(PROBE)[None] % given.config.vocab_size)
    saved = load.open_model(folder, load.load_config(folder, given.family), given.family, "auto")
    if measure_weights(saved, given.family, given.device) != (matrices, others):
        raise VerificationError(f"--save {folder}: the zeros of the saved weights differ from those in memory")
    of_saved, in_memory = (logits(model, given.family, probe, 1, given.device) for model in (saved, current.model))
    if not torch.allclose(of_saved, in_memory, rtol=0, atol=0, equal_nan=True):
        raise VerificationError(f"--save {folder}: the logits of the saved model differ from those in memory")
