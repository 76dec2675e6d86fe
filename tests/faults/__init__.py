"""The table of faults that a command line must refuse in one line; a module for each kind of input."""

from faults import (
    commands,
    environment,
    gguf,
    models,
    outputs,
    packed,
    prompts,
    records,
    texts,
    tokenizers,
    traces,
    weights,
)

MODULES = (weights, packed, models, tokenizers, gguf, outputs, commands, records, prompts, texts, traces, environment)
FAULTS = {name: fault for module in MODULES for name, fault in module.FAULTS.items()}
assert len(FAULTS) == sum(len(module.FAULTS) for module in MODULES), "two faults have one name"
