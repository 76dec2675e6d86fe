"""Train small models of five families on text that every installation has, to try methods on more than one model.

python benchmarks/small_models.py            # all of them
python benchmarks/small_models.py opt bloom

Models and texts are kept in small-models: a folder for each family, which every command here takes, and
text/train.jsonl and text/test.jsonl, whose files are disjoint. What is there is not trained again. The same seed gives
the same weights where packages, processor and number of threads are the same.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

import mixgpt.modeling.baichuan  # noqa: F401, registers Baichuan with the Auto classes
from mixgpt.common import progress
from mixgpt.common.runtime import multiplies_bfloat16
from mixgpt.common.texts import builtin_rows
from mixgpt.datautils import token_ids

FAMILIES = ("opt", "bloom", "baichuan", "gemma3", "qwen3-moe")
TYPES = {"gemma3": "gemma3_text", "qwen3-moe": "qwen3_moe"}  # of their configurations, where the name is another
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1 and 2
LONGEST = 30_000  # bytes of a file; many of the longer ones are tables
WIDTH, VOCABULARY, SEQLEN = 256, 4096, 256
BATCH, STEPS = 2, 4000  # sequences of a step
TRAIN_BYTES, TEST_BYTES = 8_000_000, 1_000_000


def build(name):
    """Return a model of random weights, whose outputs of a matrix are as large as its inputs."""
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 6, "num_attention_heads": 4,
              "initializer_range": WIDTH ** -0.5, **{f"{token}_id": number for number, token in enumerate(SPECIAL)}}
    sequence, wide = {"max_position_embeddings": SEQLEN}, {"intermediate_size": 11 * WIDTH // 4}
    heads = {"num_key_value_heads": 2, "head_dim": WIDTH // 4}
    options = {
        "opt": {"word_embed_proj_dim": WIDTH, "ffn_dim": 4 * WIDTH, "dropout": 0.0, "init_std": WIDTH ** -0.5,
                **sequence},
        "bloom": {},
        "baichuan": {"model_max_length": SEQLEN, "architectures": ["BaichuanForCausalLM"], **wide},  # with ALiBi
        "gemma3": {"sliding_window": SEQLEN // 2, "query_pre_attn_scalar": WIDTH // 4, **sequence, **heads, **wide},
        "qwen3-moe": {"moe_intermediate_size": 3 * WIDTH // 4, "num_experts": 8, "num_experts_per_tok": 2,
                      "norm_topk_prob": True, **sequence, **heads},
    }[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(TYPES.get(name, name), **common, **options))


def train_tokenizer(texts, vocabulary):
    """Return a byte-level BPE tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False,
                                  special_tokens=list(SPECIAL.values()))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **SPECIAL)


def make_texts(folder):
    """Write train.jsonl, test.jsonl and the tokenizer, unless they are there. Returns (tokenizer, train texts)."""
    if not (folder / "tokenizer_config.json").exists():  # which is written last
        folder.mkdir(parents=True, exist_ok=True)
        texts = documents(TRAIN_BYTES, TEST_BYTES)
        for part, rows in texts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        train_tokenizer(texts["train"], VOCABULARY).save_pretrained(folder)
    with (folder / "train.jsonl").open() as lines:
        return AutoTokenizer.from_pretrained(folder), [json.loads(line)["text"] for line in lines]


def documents(train_bytes, test_bytes):
    """Return {"train": texts, "test": texts} of about so many bytes each, in an arbitrary but fixed order.

    A text that occurs twice is taken once, the first time.
    """
    room, parts = {"train": train_bytes, "test": test_bytes}, {}
    for part, text in _candidates():
        if room[part] > 0 and text.strip() and text not in parts:
            parts[text] = part
            room[part] -= len(text.encode())
        if max(room.values()) <= 0:
            break
    return {part: sorted((text for text in parts if parts[text] == part), key=_hash) for part in room}


def _candidates():
    """Yield (part, text): the manual, then Python files of all packages in the order of the hashes of their paths."""
    for part in ("train", "test"):
        rows, _ = builtin_rows(part)
        yield from ((part, "\n\n".join(rows[start:start + 50])) for start in range(0, len(rows), 50))
    folders = {Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib", "platlib")}
    files = {file.relative_to(folder): file for folder in sorted(folders) for file in folder.rglob("*.py")}
    for number, file in sorted((_hash(path.as_posix()), file) for path, file in files.items()
                               if not {"site-packages", "dist-packages"} & set(path.parts)):  # of the standard library
        if file.stat().st_size <= LONGEST:
            yield "train" if number % 10 else "test", file.read_text(encoding="utf-8", errors="ignore")


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big")


def train(model, ids, title):
    """Train a model in place on random windows of the ids (n,) of a text."""
    generator, bfloat16 = torch.Generator().manual_seed(0), multiplies_bfloat16(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    scheduler = cosine_schedule(optimizer, round(0.05 * STEPS), STEPS)
    balanced = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    model.train()
    for _ in progress.bar(range(STEPS), title=title, unit="step"):
        starts = torch.randint(len(ids) - SEQLEN, (BATCH, 1), generator=generator)
        batch = ids[starts + torch.arange(SEQLEN)]  # (B, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(batch, labels=batch, use_cache=False, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def make_model(name, folder):
    """Train the model of a name in FAMILIES and save it in a folder of that name, unless it is there."""
    place, start = folder / name, time.monotonic()
    if not (place / "tokenizer_config.json").exists():  # which is written last
        tokenizer, texts = make_texts(folder / "text")
        torch.manual_seed(0)
        model = build(name)
        train(model, torch.tensor(token_ids(tokenizer, "\n\n".join(texts))), name)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        print(f"{name}: {model.num_parameters() / 1e6:.1f}M parameters, "
              f"{STEPS * BATCH * SEQLEN / 1e6:.1f}M tokens in {time.monotonic() - start:.0f} s, {place}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, "all"], default="all")
    names = parser.parse_args(argv).families
    for name in FAMILIES if "all" in names else names:
        make_model(name, Path("small-models"))


if __name__ == "__main__":
    main()
