"""Generate text with a saved model, optionally side by side with the dense one."""

import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import mixgpt
from mixgpt.app.cli import Parser, reported
from mixgpt.app.settings import BOS, check_between, check_model
from mixgpt.common.errors import InputError


def _parse(script, argv):
    parser = Parser(prog=script, description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of --save, hub id, local folder or .gguf file")
    parser.add_argument("prompt", type=str, help="text to continue")
    parser.add_argument("--dense", metavar="MODEL", help="another model, whose text is shown on the left")
    parser.add_argument("--max-new-tokens", type=int, default=64,
                        help="maximum number of tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="sampling temperature; 0: greedy (default: 0); all else as in generation_config.json")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    parser.add_argument("--bos", default="auto", choices=["auto", *BOS],
                        help="whether the prompt begins with the token for the beginning of a text; each: also if it "
                             "is cut to the model's context; once: only at its own beginning; never; auto: each for "
                             "models that need it (Gemma), else what the tokenizer does by itself (default: auto)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="of all weights in memory; auto: as stored in `model`, but float32 where that is faster")
    given = parser.parse_args(argv)
    check_between("--max-new-tokens", given.max_new_tokens, 1)
    check_between("--temperature", given.temperature, 0)
    check_between("--seed", given.seed, 0, 2**64 - 1)
    if not given.prompt:
        raise InputError("prompt: is empty; give a text to continue")
    check_model("model", given.model)
    check_model("--dense", given.dense or "")
    return vars(given)


def main(script, argv=None):
    """Run the command line of a script, given by its path. Returns the exit status, see `reported`."""
    remedy = "lower --max-new-tokens, or give --dtype bfloat16 or --device cpu"
    script, argv = Path(script).name, sys.argv[1:] if argv is None else argv
    with reported(script, argv, remedy) as end:
        given = _parse(script, argv)
        model, dense = given.pop("model"), given.pop("dense")
        print_completions({"dense": dense, "model": model} if dense else {"model": model}, **given)
    return end.status


def print_completions(models, prompt, device, dtype, bos, **options):
    """Print the completions of models {title: name}, run one after the other. options: further ones of `complete`."""
    from mixgpt.checkpoints.load import read_config
    from mixgpt.common.runtime import choose_device, choose_dtype
    from mixgpt.datautils import resolve_bos  # slow, as are the others
    from mixgpt.evaluation.generation import complete
    device, completions, config = choose_device(device), {}, read_config(models["model"])
    dtype = choose_dtype(dtype, config, device)
    for title, name in models.items():
        loaded, tokenizer = mixgpt.load(name, device, config.dtype if dtype == "auto" else dtype)
        completions[title] = completion = complete(
            loaded, tokenizer, prompt, bos=resolve_bos(bos, loaded.config.model_type, tokenizer), **options)
        del loaded  # before the next one is loaded
        if completion.cut:
            print(f"warning  prompt: longer than the context of {name}, which reads it without its first "
                  f"{completion.cut} tokens")
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 20), 120)
    texts = {title: completion.text for title, completion in completions.items()}
    lines = side_by_side(texts, width) if len(texts) > 1 else wrapped(texts["model"], width)
    print(*wrapped(prompt, width), "", *lines, sep="\n")
    speeds = (f"{title} {each.tokens} tokens in {each.seconds:.1f} s, {each.rate:.1f} tokens/s after the first, "
              f"weights {each.nbytes / 1e6:.0f} MB" for title, each in completions.items())
    print("\n" + "; ".join(speeds) + f" on {device}")
    if len(models) > 1:
        dense, other = completions.values()
        print(f"{other.rate / dense.rate:.2f} times as fast, {other.nbytes / dense.nbytes:.2f} times the memory")


def side_by_side(texts, width):
    """Return {title: text} as lines of at most `width` characters, in adjacent columns."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[title, "-" * each, *wrapped(text, each)] for title, text in texts.items()]
    return [" | ".join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue="")]


def wrapped(text, width):
    """Return the lines of a text, none longer than `width`."""
    return [part for line in text.strip("\n").expandtabs(4).splitlines()
            for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]]
