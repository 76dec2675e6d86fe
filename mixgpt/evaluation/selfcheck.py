"""Check on random weights, before real ones are read, that a model may run one decoder layer at a time."""

import contextlib
import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mixgpt.common.errors import InputError, reading
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.linears import linears, shared_inputs
from mixgpt.modeling.running import StreamedModel

# A small copy of a model has at most so many layers, and these limits in its configuration.
LAYERS = 12
VOCABULARY = 512
WIDTHS = dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 64)
TOKENS = 16
SEQUENCES = 3
TOLERANCE = 1e-3  # Logits may differ by this share of their standard deviation; rounding is 1e-6 to 1e-4.


@torch.no_grad()
def check(name: str, skeleton: PreTrainedModel, device: torch.device) -> tuple[float, list[str]]:
    """Raise InputError if a model's logits differ when its layers run one at a time.

    skeleton: the model on meta. A copy with random weights and a few layers, of every kind, runs on the host, or on the
    device if need be, in batches of two and of one. Returns the bytes that a sequence takes between two layers, in
    units of its hidden states alone; and the names of linears that are not called as modules.
    """
    kind, layers, uncalled = type(skeleton).__name__, decoder.layers_of(skeleton), set()
    refusal = f"model {name}: this {kind} cannot be run one decoder layer at a time"
    with reading(refusal):
        # Kernels of other packages may need a GPU; sizes may depend on each other, so that no narrow copy can be built.
        for place, narrow in ((torch.device("cpu"), True), (device, True), (device, False)):
            with contextlib.suppress(*[Exception] if narrow else []), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = with_few_layers(skeleton.config, layers, 2)
                config.vocab_size = min(config.vocab_size, VOCABULARY)
                limits = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), config.vocab_size - 1)
                limits |= {"vocab_size_per_layer_input": VOCABULARY} | (WIDTHS if narrow else {})
                for key, limit in limits.items():
                    if isinstance(value := getattr(config, key, None), int):
                        setattr(config, key, min(value, limit))
                config.initializer_range = 0.2  # Small weights would hide differences.
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
                model.eval().to(place)
                tokens = torch.randint(config.vocab_size, (SEQUENCES, TOKENS)).to(place)
                expected = model(tokens, use_cache=False).logits
                break
        experts.use_linears(model)
        streams = [StreamedModel(model, place, size).embed(tokens) for size in (2, 1)]
        for index, layer in enumerate(decoder.layers_of(model)):
            uncalled |= linears(layer).keys() - set().union(*shared_inputs(layer, index, streams[0]))
            for stream in streams:
                stream.advance(layer, index)
        with streams[0].head(model) as head:
            outputs = [head(stream.hidden.flatten(0, 1).to(place)).view_as(expected) for stream in streams]
        difference = (torch.stack(outputs) - expected).abs().max() / expected.std()
    if not difference <= TOLERANCE:
        raise InputError(f"{refusal}: on random weights, its logits differ by {difference:.1g} standard deviations")
    return (streams[0].hidden.nbytes / (tokens.numel() * model.config.hidden_size * torch.float32.itemsize),
            sorted(uncalled))


def with_few_layers(config: PretrainedConfig, layers: torch.nn.ModuleList, least: int) -> PretrainedConfig:
    """Return a copy of a configuration with as few of its first layers as show every kind, and at least so many."""
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) >= len(layers)]
    # A kind is a layer's modules, and its entries in lists of the configuration.
    kinds = [([str(value[index]) for value in lists], [(name, type(module)) for name, module in layer.named_modules()])
             for index, layer in enumerate(layers)]
    count = max(kinds.index(kind) for kind in kinds[:LAYERS]) + 1
    shares = getattr(config, "num_kv_shared_layers", 0)
    count = min(max(2 * count if shares else count, least), len(layers))
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, key, value[:count])
    if shares:  # half of the layers share keys and values
        config.num_kv_shared_layers = count // 2
    config.num_hidden_layers = count
    return config
