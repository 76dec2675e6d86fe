"""Prune a tiny random model of every causal-LM class of transformers to 50% by best, and write docs/models.md.

python benchmarks/models.py docs/models.md            # all of them, in five minutes
python benchmarks/models.py models.md llama gpt2
"""

import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from scores import table_of_markdown
from small_models import train_tokenizer
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import mixgpt
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError, one_line
from mixgpt.common.texts import builtin_rows
from mixgpt.evaluation.measures import Survey
from mixgpt.modeling.running import StreamedModel

PAGE = """# Models

The causal-LM classes of transformers {version} and Baichuan, tiny and with random weights:
{counts}. `ok`: `best` pruned half of the weights, and of the dense model and
the saved one, layers that are read from disk and run one at a time gave the logits of the class's own forward on three
sequences. `refused`: in one line, before weights are read. `not built`: the benchmark could not make a tiny one.
This is what `python benchmarks/models.py docs/models.md` writes.

"""
SIZES = {  # of a setting that is larger, by the first pattern that its name has; None: it stays
    r"token_id|^qk_head_dim|^attention_": None, r"vocab|n_words": 384, r"expert.*per_tok|topk$|moe_k$|kv_shared": 2,
    r"n_group|topk_group|expert_group|n_shared_experts": 1, r"expert(?!.*(size|dim))": 4, r"mamba.*heads$": 8,
    r"kv_heads|key_value_heads|recurrent_layers": 2, r"head_?dim|d_head|rotary_dim": 8, r"(input|output)_layers$": 1,
    r"heads?$|layers?$": 4, r"rank|moe.*size": 16, r"intermediate|ffn|dff|dim_ff": 48, r"d_ssm": 64,
    r"position|max_seq|n_ctx|max_length": 128, r"window|local_attention|chunk_size|state_size|d_state": 8,
    r"hidden_size|d_model|n_embd|emb_dim": 32}
UNSET = "head_dim num_key_value_heads n_routed_experts n_shared_experts num_experts_per_tok".split()  # in some classes
FIXED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "init_std": 0.2}
HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 2}
OTHERS = {  # of a model_type
    "baichuan": {"architectures": ["BaichuanForCausalLM"], "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]}, "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "xmod": {"default_language": "en_XX"}, "zamba": HYBRID, "zamba2": HYBRID}


def tiny(kind):
    """Return a tiny configuration of a model_type."""
    default, sizes = CONFIG_MAPPING[kind](), {}
    for name, value in default.to_dict().items():
        size = next((size for pattern, size in SIZES.items() if re.search(pattern, name)), None)
        if size and (name in UNSET if value is None else type(value) is int and value > size):
            sizes[name] = size
    if "kv_lora_rank" in sizes:  # latent attention
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    fixed = {name: value for name, value in FIXED.items() if hasattr(default, name)}
    return CONFIG_MAPPING[kind](**sizes | fixed | OTHERS.get(kind, {}))


def difference(folder, tokens):
    """Return by how many standard deviations logits of tokens (N, T) differ from the class's own forward at most."""
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens, use_cache=False).logits
    opened = load.open_model(folder, load.read_config(folder), "auto")
    _, logits = Survey(StreamedModel(opened, torch.device("cpu"), 2), tokens).finish()
    return ((logits - expected).abs().max() / expected.std()).item()


@torch.no_grad()
def prune(kind, folder, tokenizer):
    """Prune a tiny model in a folder. Returns what comes of it, and what stays dense or why there is none."""
    model, saved, tokens = f"{folder}/model", f"{folder}/saved", torch.randint(3, 384, (3, 24))
    try:
        text = CONFIG_MAPPING[kind]().get_text_config()
        if text.model_type in CONFIG_MAPPING and text.model_type != kind and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "text part", f"is a `{text.model_type}`"
        with torch.device("meta"):
            numel = AutoModelForCausalLM.from_config(tiny(kind)).num_parameters()
        if numel > 2e7:
            return "not built", f"has {numel / 1e6:.0f}M parameters as the benchmark makes it"
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(tiny(kind)).eval()
        if not built(tokens, use_cache=False).logits.isfinite().all():
            return "not built", "its own forward gives NaN or inf"
        built.save_pretrained(model)
        tokenizer.save_pretrained(model)
    except Exception as error:  # of the class, or of the sizes
        return "not built", one_line(error)
    try:
        result = mixgpt.prune(model, tokens, sparsity=0.5, preset="best", eval=[], device="cpu", save=saved, quiet=True)
    except InputError as error:
        return "refused", one_line(error).replace(f"model {model}: ", "")
    if not (worst := max(difference(model, tokens), difference(saved, tokens))) <= 1e-3:
        return "WRONG", f"logits differ by {worst:.1g} standard deviations"
    return "ok", ", ".join({f"`{row['name']}`": 0 for row in result.record.get("left_dense", ())})


def main(argv=None):
    output, *kinds = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if output.startswith("-"):
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    tokenizer, rows = train_tokenizer(builtin_rows("train")[0][:100], 384), []
    for config, classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        if not kinds or config.model_type in kinds:
            with tempfile.TemporaryDirectory() as folder:
                result, why = prune(config.model_type, folder, tokenizer)
            name = (classes if isinstance(classes, type) else classes[0]).__name__
            rows.append([f"`{config.model_type}`", name, result, why])
            print(*rows[-1], flush=True)
    counts = ", ".join(f"{count} {result}" for result, count in Counter(row[2] for row in rows).most_common())
    Path(output).write_text(PAGE.format(version=transformers.__version__, counts=counts) + table_of_markdown(
        ["model_type", "class", "result", "what else stays dense, or why"], rows) + "\n")


if __name__ == "__main__":
    main()
