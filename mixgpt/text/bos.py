"""Tokenize texts, with BOS, the token for the beginning of a text, before each sequence, before each text, or nowhere.

The papers cut a whole text into segments, of which only the first begins with BOS, if the tokenizer adds it. Most
models predict as well without. Gemma models do not: they were trained with BOS in front of every sequence.
"""

from mixgpt.common.errors import InputError, reading

# Parts of the model types that need BOS in front of every sequence: lm-eval (pull request 1465: perplexity of Gemma-7B
# on LAMBADA 6e9 without BOS, 3.5 with it; 2049 and 2105: the others) and llama.cpp (21500: Gemma 4) add it to the same.
NEED_EACH = ("gemma",)


def resolve(bos, model_type, tokenizer):
    """Return each, once or never for a value of --bos; auto is what a model of this type needs, or its tokenizer does.

    Raises InputError if the tokenizer has no BOS to put in front.
    """
    if bos == "auto" and any(name in model_type for name in NEED_EACH):
        bos = "each"
    elif bos == "auto":
        bos = "once" if encode(tokenizer, "a").input_ids[:1] == [tokenizer.bos_token_id] else "never"
    if bos != "never" and tokenizer.bos_token_id is None:
        raise InputError(f"--bos {bos}: the tokenizer of model {tokenizer.name_or_path} has no BOS; must be never")
    return bos


def encode(tokenizer, text, **options):
    """Return what a tokenizer gives for a text. Raises InputError if it fails."""
    with reading(f"model {tokenizer.name_or_path}: its tokenizer fails on a text"):
        return tokenizer(text, verbose=False, **options)  # else it warns that the text exceeds the model's length


def token_ids(tokenizer, text, bos=None):
    """Return the ids of a whole text, with the special tokens that the tokenizer adds by itself, except for BOS.

    bos: each or once: BOS in front; never: none; None: what the tokenizer does. A text that begins with BOS, such as a
    chat by its template, stays as it is.
    """
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = encode(tokenizer, text, add_special_tokens=not begun).input_ids
    if begun or bos is None or (ids[:1] == [tokenizer.bos_token_id]) == (bos != "never"):
        return ids
    return ids[1:] if bos == "never" else [tokenizer.bos_token_id, *ids]


def first_token(tokenizer, bos):
    """Return the id that every sequence begins with, None if they begin with whatever token comes."""
    return tokenizer.bos_token_id if bos == "each" else None


def begin(sequences, first):
    """Put the id of `first_token` in place of the first token of sequences (n, T), in place. Returns them."""
    if first is not None:
        sequences[:, 0] = first
    return sequences
