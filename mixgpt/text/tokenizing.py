"""Run the tokenizer of a model; its errors are one line."""

from mixgpt.common.errors import InputError, reading


def encode(tokenizer, text, **options):
    """Return what a tokenizer gives for a text. Raises InputError if it fails."""
    with reading(f"model {tokenizer.name_or_path}: its tokenizer fails on a text"):
        return tokenizer(text, verbose=False, **options)  # else it warns that the text exceeds the model's length


def as_texts(rows, tokenizer):
    """Return rows as text: chats, [{"role": …, "content": …}, …], by the tokenizer's chat template, in jinja's sandbox.

    Raises InputError if there is no template, or if it fails.
    """
    model = tokenizer.name_or_path
    if not tokenizer.chat_template and not all(isinstance(row, str) for row in rows):
        raise InputError(f"model {model}: its tokenizer has no chat template, which rows of messages need")
    with reading(f"model {model}: its chat template"):
        return [row if isinstance(row, str) else tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
