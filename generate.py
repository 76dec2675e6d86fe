"""Generate text with a saved model, and with the dense one beside it.

python generate.py pruned "The capital of France is"
python generate.py pruned "The capital of France is" --dense facebook/opt-125m --max_new_tokens 40
python generate.py SmolLM2-135M-Instruct.Q4_1.gguf "Once upon a time" --temperature 0.8 --seed 1

A model is a folder that the scripts here saved, in any of their formats, a hub id, a folder or a .gguf file.
"""

import shutil
import sys
import textwrap
import time
from dataclasses import dataclass

import torch
import transformers
from transformers import GenerationConfig

from mixgpt.checkpoints.load import load_model, load_tokenizer, read_config
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import choose_device, choose_dtype, position_limit
from settings import Parser

WIDEST = 120  # columns


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    text: str  # without the prompt
    tokens: int  # generated
    seconds: float  # for all of them, the prompt included

    @property
    def speed(self):
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / self.seconds:.1f} tokens/s"


@torch.no_grad()
def complete(model, tokenizer, prompt, max_new_tokens=64, temperature=0.0, seed=0, until=()):
    """Let a model that is whole on its device go on with `prompt`. Returns a `Completion`.

    temperature: 0 takes the likeliest token each time; else they are drawn, from `seed`. until: texts that end it, and
    that are cut off. Where the prompt and what follows exceed what the model can take, the prompt loses its beginning;
    where even that leaves no room, raises InputError.
    """
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not begun, return_tensors="pt", verbose=False).input_ids.to(model.device)
    limit = position_limit(model.config)
    if limit and max_new_tokens >= limit:
        raise InputError(f"--max_new_tokens {max_new_tokens}: the model's limit is {limit} tokens, with the prompt")
    ids = ids[:, -(limit - max_new_tokens):] if limit else ids
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=0,
                                eos_token_id=model.generation_config.eos_token_id, stop_strings=list(until) or None,
                                **choice)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                                tokenizer=tokenizer)[0, ids.shape[1]:].tolist()
        seconds = time.perf_counter() - start
    text = tokenizer.decode(output, skip_special_tokens=True)
    for end in until:
        text = text.partition(end)[0]
    return Completion(text, len(output), seconds)


def side_by_side(texts, width=100):
    """Lay out {title: text} in columns beside each other, in lines of at most `width` characters."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[title, "-" * each, *wrapped(text, each)] for title, text in texts.items()]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)


def wrapped(text, width):
    """Return the lines of a text, none longer than `width`."""
    return [part for line in text.strip("\n").expandtabs(4).splitlines()
            for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]]


def load(model, device, dtype="auto"):
    """Load a model in any format, and its tokenizer. Returns (model on `device`, tokenizer)."""
    config = read_config(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, choose_dtype(dtype, config, device))
    try:
        return loaded.to(device), tokenizer
    except torch.OutOfMemoryError as error:
        raise InputError(f"model {model}: the GPU's memory does not suffice; give --device cpu") from error


def _parse(argv):
    parser = Parser(prog="generate.py", allow_abbrev=False,
                    description="Generate text with a saved model, and with the dense one beside it.")
    parser.add_argument("model", help="folder that the scripts here saved, hub id, folder or .gguf file")
    parser.add_argument("prompt", help="text to go on with")
    parser.add_argument("--dense", metavar="MODEL", help="another model, to show its text on the left")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0: the likeliest token each time; higher: drawn, the more evenly the higher (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="of the weights in memory; auto: as stored, but float32 for float16 on a CPU")
    given = parser.parse_args(argv)
    if given.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens {given.max_new_tokens}: must be at least 1")
    if not 0 <= given.temperature < float("inf"):
        raise InputError(f"--temperature {given.temperature:g}: must be at least 0")
    if not given.prompt:
        raise InputError("prompt: is empty; give a text to go on with")
    return vars(given)


def run(model, prompt, dense, max_new_tokens, temperature, seed, device, dtype):
    """Print what a model, or two in turn, make of a prompt."""
    device, made = choose_device(device), {}
    names = {"dense": dense, "pruned": model} if dense else {"model": model}
    for title, name in names.items():
        loaded, tokenizer = load(name, device, dtype)
        made[title] = complete(loaded, tokenizer, prompt, max_new_tokens, temperature, seed)
        del loaded  # before the next one is loaded
    width = min(shutil.get_terminal_size((100, 24)).columns, WIDEST)
    print("\n".join(wrapped(prompt, width)), end="\n\n")
    if dense:
        print(side_by_side({title: each.text for title, each in made.items()}, width))
    else:
        print("\n".join(wrapped(made["model"].text, width)))
    print("\n" + "; ".join(f"{title} {each.speed}" for title, each in made.items()) + f" on {device}")


def main(argv=None):
    """Run the command line. Returns the exit status, 2 after one line about unusable input."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        run(**_parse(argv))
    except InputError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
