"""Train small models of five families on text that every installation has, to try methods on more than one model.

python benchmarks/small_models.py            # all of them
python benchmarks/small_models.py opt bloom

Models and texts are kept in ~/.cache/mixgpt/small-models: a folder for each family, which every command here takes, and
text/train.jsonl and text/test.jsonl, whose files are disjoint. What is there is not trained again. The same seed gives
the same weights where packages, processor and number of threads are the same.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from sources import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from datautils import segments_of, token_ids
from mixgpt.common import progress
from mixgpt.common.errors import InputError, one_line
from mixgpt.common.files import cache_folder, locked, os_errors, replacing_folder
from mixgpt.evaluation.perplexity import perplexity
from mixgpt.kernels.matmul import multiplies_bfloat16
from mixgpt.modeling.baichuan import BaichuanConfig, BaichuanForCausalLM
from mixgpt.modeling.family import family_of

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1 and 2
SPECIAL_IDS = {f"{name}_id": number for number, name in enumerate(SPECIAL)}
WARMUP = 0.05  # share of the steps
BFLOAT16 = multiplies_bfloat16()
SEGMENTS = 128  # of the test text for the perplexity that is reported


@dataclass(frozen=True)
class Size:
    """How large models and texts are, and how long models are trained."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    experts: int = 8  # of which two are active
    vocabulary: int = 4096
    seqlen: int = 256
    batch: int = 2  # sequences per step
    steps: int = 4000
    rate: float = 2e-3  # highest learning rate
    train_bytes: int = 8_000_000
    test_bytes: int = 1_000_000

    @property
    def spread(self):
        """Standard deviation of the first weights: outputs of a matrix are as large as its inputs.

        The usual 0.02 suits widths of thousands; with it these models learn more slowly.
        """
        return self.width ** -0.5


SIZE = Size()


def make_opt(size):
    return OPTForCausalLM(OPTConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, word_embed_proj_dim=size.width, ffn_dim=4 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=size.seqlen, dropout=0.0,
        init_std=size.spread, **SPECIAL_IDS))


def make_bloom(size):
    return BloomForCausalLM(BloomConfig(vocab_size=size.vocabulary, hidden_size=size.width, n_layer=size.layers,
                                        n_head=size.heads, initializer_range=size.spread, **SPECIAL_IDS))


def make_baichuan(size):
    return BaichuanForCausalLM(BaichuanConfig(  # with model_max_length, as the 13B models, whose positions are ALiBi
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=11 * size.width // 4,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, model_max_length=size.seqlen,
        initializer_range=size.spread, **SPECIAL_IDS))


def gated(size):
    """Return what the configurations of Gemma-3 and Qwen3-MoE have in common."""
    return {"vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 2,
            "head_dim": size.width // size.heads, "max_position_embeddings": size.seqlen,
            "initializer_range": size.spread, **SPECIAL_IDS}


def make_gemma3(size):
    return Gemma3ForCausalLM(Gemma3TextConfig(
        intermediate_size=11 * size.width // 4, sliding_window=size.seqlen // 2,
        query_pre_attn_scalar=size.width // size.heads, **gated(size)))


def make_qwen3_moe(size):
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        moe_intermediate_size=3 * size.width // 4, num_experts=size.experts, num_experts_per_tok=2, norm_topk_prob=True,
        **gated(size)))


FAMILIES = {"opt": make_opt, "bloom": make_bloom, "baichuan": make_baichuan, "gemma3": make_gemma3,
            "qwen3-moe": make_qwen3_moe}


def train_tokenizer(texts, vocabulary):
    """Return a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_texts(folder, size):
    """Write train.jsonl, test.jsonl and the tokenizer, unless there is such a folder.

    Returns (tokenizer, {part: rows}).
    """
    if not folder.exists():
        texts = documents(size.train_bytes, size.test_bytes)
        with replacing_folder(folder) as partial:
            for part, rows in texts.items():
                (partial / f"{part}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
            train_tokenizer(texts["train"], size.vocabulary).save_pretrained(partial)
    texts = {part: [json.loads(line)["text"] for line in (folder / f"{part}.jsonl").read_text().splitlines()]
             for part in ("train", "test")}
    return AutoTokenizer.from_pretrained(folder), texts


def schedule(done):
    """Return the factor of the learning rate after a share of the steps: a linear warm-up, then half a cosine."""
    return done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def train(model, ids, size, seed, title):
    """Train a model in place on random windows of the ids (n,) of a text."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule((step + 1) / (size.steps + 1)))
    balanced = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    model.train()
    for _ in progress.bar(range(size.steps), title=title, unit="step"):
        starts = torch.randint(len(ids) - size.seqlen, (size.batch, 1), generator=generator)
        batch = ids[starts + torch.arange(size.seqlen)]  # (B, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = model(batch, labels=batch, use_cache=False, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def make_model(name, folder, size, seed):
    """Train the model of a name in FAMILIES and save it as a folder. Returns the record of that, training.json.

    A folder that is there is kept, and its record returned. Other processes wait meanwhile.
    """
    asked = {"seed": seed, "size": asdict(size)}
    with locked(folder / "lock"):
        if (folder / name).exists():
            return read_record(folder / name, asked)
        tokenizer, texts = make_texts(folder / "text", size)
        torch.manual_seed(seed)
        model, start = FAMILIES[name](size), time.monotonic()
        train(model, torch.tensor(token_ids(tokenizer, "\n\n".join(texts["train"]))), size, seed, name)
        record = {"parameters": model.num_parameters(), "tokens": size.steps * size.batch * size.seqlen,
                  "seconds": time.monotonic() - start, "perplexity": held_out(model, tokenizer, texts["test"], size)}
        record |= asked
        with replacing_folder(folder / name) as partial, os_errors():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def held_out(model, tokenizer, rows, size):
    """Return the perplexity on the beginning of the test text."""
    tests = segments_of(rows, {"dataset": "builtin", "split": "test"}, size.seqlen, tokenizer)[:SEGMENTS]
    return perplexity(model, family_of(model), tests, size.batch, torch.device("cpu"))


def read_record(folder, asked):
    """Return the record of a trained model. Raises InputError if it is of other settings than those asked for."""
    try:
        record = json.loads((folder / "training.json").read_text())
        fits = asked.items() <= record.items()
    except (OSError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise InputError(f"{folder}: was not trained by this version of the script; remove it, and it is trained again")
    return record


def main(argv=None):
    """Returns the exit status: 0, or 2 after one line about what cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    names = parser.parse_args(argv).families or list(FAMILIES)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = cache_folder() / "small-models"
    try:
        if unknown := [name for name in names if name not in FAMILIES]:
            raise InputError(f"family {unknown[0]}: must be one of {', '.join(FAMILIES)}")
        for name in names:
            record = make_model(name, folder, SIZE, 0)
            print(f"{name}: {record['parameters'] / 1e6:.1f}M parameters, {record['tokens'] / 1e6:.1f}M tokens in "
                  f"{record['seconds']:.0f} s, held-out perplexity {record['perplexity']:.2f}, {folder / name}",
                  flush=True)
    except InputError as error:
        print(f"small_models.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"small_models.py: error: {folder}: cannot be used ({error.strerror or one_line(error)}); set "
              "XDG_CACHE_HOME to another folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
