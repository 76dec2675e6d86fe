"""Check on random weights, before real ones are read, that a model may run one decoder layer at a time."""

import inspect

import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import split_experts
from modelutils import HiddenStates, linears, shared_inputs, with_layers

FAULTY = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, ZeroDivisionError)
VOCABULARY = 512  # the most tokens of a small copy
WIDTHS = ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
WIDTH = 64  # the most that these are in a narrow copy
LAYERS = 12  # the most layers of a small copy
TOKENS = 16
SEQUENCES = 3
TOLERANCE = 1e-3  # of the standard deviation of the logits; rounding is 1e-6 to 1e-4


def check(name, family, skeleton, calibrated=()):
    """Raise InputError if a model's logits differ when its layers run one at a time.

    name: of the model, for the message. skeleton: the model on meta. calibrated: names of linears whose inputs must be
    seen, as they are to be calibrated. Compares on SEQUENCES of them, in batches of two sizes, through a copy of the
    configuration with random weights, and as many layers as show each kind of layer.
    """
    kind, layers = type(skeleton).__name__, family.layers_of(skeleton)
    refusal = f"model {name}: this {kind} cannot be run one decoder layer at a time: "
    try:
        try:
            model, tokens, expected = _run_whole(small(skeleton.config, layers))
        except FAULTY:  # sizes that depend on each other in a way of their own
            model, tokens, expected = _run_whole(small(skeleton.config, layers, narrow=False))
    except FAULTY as error:
        raise InputError(f"{refusal}{type(error).__name__}: {error}".splitlines()[0]) from error
    try:
        unseen, difference = _compare(model, family, tokens, expected)
    except FAULTY as error:
        reason = _dependence(model, family, tokens) or f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(refusal + reason) from error
    if not difference <= TOLERANCE:
        raise InputError(refusal + (_dependence(model, family, tokens) or "on random weights, its logits differ by "
                                    f"{difference:.1g} standard deviations"))
    if unseen := [linear for linear in unseen if linear in calibrated]:
        raise InputError(f"model {name}: {', '.join(unseen)} of this {kind} are not called as modules, so that they "
                         "cannot be calibrated; leave them out with --prune_only")


@torch.no_grad()
def _run_whole(config):
    """Return a random model of a configuration, tokens (N, T), and its logits for them by its own forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        tokens = torch.randint(config.vocab_size, (SEQUENCES, TOKENS))
    return model, tokens, model(tokens, use_cache=False).logits


@torch.no_grad()
def _compare(model, family, tokens, expected):
    """Run tokens (N, T) one layer at a time, in batches of two, the last one of one, and in batches of one.

    expected: logits (N, T, vocabulary). Returns the linears never called, and the largest difference of the logits,
    in standard deviations of all of these.
    """
    split_experts(model)
    unseen, streams = set(), [HiddenStates.embed(model, family, tokens, size, tokens.device) for size in (2, 1)]
    for index, layer in enumerate(family.layers_of(model)):
        unseen |= linears(layer).keys() - set().union(*shared_inputs(layer, index, streams[0]))
        for stream in streams:
            stream.advance(layer, index)
    with streams[0].head(model, family) as head:
        differences = [head(stream.hidden.flatten(0, 1)).view_as(expected) - expected for stream in streams]
    return sorted(unseen), (torch.stack(differences).abs().max() / expected.std()).item()


@torch.no_grad()
def _dependence(model, family, tokens):
    """Say what the arguments of a random model's layers depend on that is not known before they run, or return None.

    Changes the model.
    """
    layers = family.layers_of(model)
    before = _arguments(model, layers, tokens)
    if len(before) != len(layers):
        return f"its {len(layers)} layers run {len(before)} times"
    for weight in layers[0].parameters():
        weight.normal_()
    for ours, theirs in zip(before, _arguments(model, layers, tokens), strict=True):
        for name in ours:
            tensors = [[leaf for leaf in tree_leaves(each.get(name)) if torch.is_tensor(leaf)]
                       for each in (ours, theirs)]
            if any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(*tensors, strict=True)):
                return f"its layers take {name}, which depends on the layers before"
    return None


def _arguments(model, layers, tokens):
    """Return {name: argument} of each call of a layer beside hidden states in a model's own forward."""
    calls = []

    def note(layer, args, kwargs):
        named = list(inspect.signature(layer.forward).bind(*args, **kwargs).arguments.items())
        calls.append(dict(named[1:]))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def small(config, layers, narrow=True):
    """Return a copy of a configuration with few layers, of every kind that `layers` have, and a small vocabulary.

    narrow: also with few heads and narrow MLPs.
    """
    kinds = [_kind(config, index, layer) for index, layer in enumerate(layers)]
    count = max(kinds.index(kind) for kind in kinds[:LAYERS]) + 1
    if getattr(config, "num_kv_shared_layers", 0):
        count *= 2
    config = with_layers(config, min(max(count, 2), len(layers)))
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(value := getattr(config, key, None), int):
            setattr(config, key, min(value, VOCABULARY))
    if narrow:
        _narrow(config)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(value := getattr(config, key, None), int):
            setattr(config, key, min(value, config.vocab_size - 1))
    config.initializer_range = 0.2  # small weights would hide differences
    return config


def _narrow(config):
    """Let a configuration have narrow MLPs and few heads, as wide as before and at most 2 queries to a key."""
    for key in WIDTHS:
        if isinstance(value := getattr(config, key, None), int):
            setattr(config, key, min(value, WIDTH))
    heads, shared = config.num_attention_heads, vars(config).get("num_key_value_heads")  # of most layers in Gemma 4
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
