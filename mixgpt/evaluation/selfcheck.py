"""Check on random weights, before real ones are read, that a model may run one decoder layer at a time."""

import copy

import torch
from transformers import AutoModelForCausalLM

from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import split_experts
from modelutils import Stream, linears, shared_inputs

FAULTY = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, ZeroDivisionError)
VOCABULARY = 512  # the most tokens of a small copy
WIDTHS = ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
WIDTH = 64  # the most that these are in a narrow copy
LAYERS = 12  # the most layers of a small copy
TOKENS = 16
TOLERANCE = 1e-3  # of the standard deviation of the logits; rounding is 1e-6 to 1e-4


def check(name, family, skeleton, calibrated=()):
    """Raise InputError if a model's logits differ when its layers run one at a time.

    name: of the model, for the message. skeleton: the model on meta. calibrated: names of linears whose inputs must be
    seen, as they are to be calibrated. Compares on one sequence through a copy of the configuration with random
    weights, and as many layers as show each kind of layer.
    """
    kind = type(skeleton).__name__
    try:
        try:
            model, tokens, expected = _run_whole(small(skeleton.config, family.layers_of(skeleton)))
        except FAULTY:  # sizes that depend on each other in a way of their own
            model, tokens, expected = _run_whole(small(skeleton.config, family.layers_of(skeleton), narrow=False))
        split_experts(model)
        found, unseen = _streamed(model, family, tokens)
    except FAULTY as error:
        raise InputError(f"model {name}: this {kind} cannot be run one decoder layer at a time: "
                         f"{type(error).__name__}: {error}".splitlines()[0]) from error
    difference = ((found - expected).abs().max() / expected.std()).item()
    if not difference <= TOLERANCE:
        raise InputError(f"model {name}: this {kind} cannot be run one decoder layer at a time: on "
                         f"random weights, its logits differ by {difference:.1g} standard deviations")
    if unseen := [linear for linear in unseen if linear in calibrated]:
        raise InputError(f"model {name}: {', '.join(unseen)} of this {kind} are not called as modules, so that they "
                         "cannot be calibrated; leave them out with --prune_only")


@torch.no_grad()
def _run_whole(config):
    """Return a random model of a configuration, tokens (1, T), and its logits for them by its own forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        tokens = torch.randint(config.vocab_size, (1, TOKENS))
    return model, tokens, model(tokens, use_cache=False).logits


@torch.no_grad()
def _streamed(model, family, tokens):
    """Return the logits (1, T, vocabulary) of tokens (1, T), one layer at a time, and the linears never called."""
    stream, unseen = Stream.embed(model, family, tokens, 1, tokens.device), {}
    for index, layer in enumerate(family.layers_of(model)):
        unseen |= dict.fromkeys(linears(layer).keys() - set().union(*shared_inputs(layer, index, stream)))
        stream.advance(layer, index)
    with stream.head(model, family) as head:
        return head(stream.hidden[0])[None], sorted(unseen)


def small(config, layers, narrow=True):
    """Return a copy of a configuration with few layers, of every kind that `layers` have, and a small vocabulary.

    narrow: also with few heads and narrow MLPs.
    """
    kinds = [_kind(config, index, layer) for index, layer in enumerate(layers)]
    count = max(kinds.index(kind) for kind in kinds[:LAYERS]) + 1
    count = min(max(count, 2), len(layers))
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(config, key, value[:count])
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    if narrow:
        _narrow(config)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(value := getattr(config, key, None), int):
            setattr(config, key, min(value, config.vocab_size - 1))
    config.num_hidden_layers = count
    config.initializer_range = 0.2  # small weights would hide differences
    return config


def _narrow(config):
    """Let a configuration have narrow MLPs and few heads, as wide as before and at most 2 queries to a key."""
    for key in WIDTHS:
        if isinstance(value := getattr(config, key, None), int):
            setattr(config, key, min(value, WIDTH))
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    fewer = min(shared or heads, 2)
    few = fewer * min(heads // (shared or heads), 2)
    if few >= heads or config.hidden_size % heads:
        return
    before, config.num_attention_heads = config.hidden_size, few
    if shared:
        config.num_key_value_heads = fewer
    config.hidden_size = before // heads * few
    if getattr(config, "word_embed_proj_dim", None) == before:
        config.word_embed_proj_dim = config.hidden_size


def _kind(config, index, layer):
    """Return what tells a layer from layers of other kinds: its modules, and its entries in lists of the config."""
    entries = [str(value[index]) for value in config.to_dict().values()
               if isinstance(value, list) and len(value) > index]
    return tuple(entries), tuple((name, type(module)) for name, module in layer.named_modules())
