"""Generate text with a saved model, optionally side by side with the dense one."""

import math
import shutil
import sys
import textwrap
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mixgpt
from mixgpt.app.cli import Parser, reported
from mixgpt.app.settings import BOS, check_between, check_model
from mixgpt.common.errors import InputError, reading


def main(script: str, argv: list[str] | None = None) -> int:
    """Run the command line of a script, see `reported`. Returns the exit status."""
    parser = Parser(prog=Path(script).name, description=__doc__)
    parser.add_argument("model", help="folder of --save, hub id, local folder or .gguf file")
    parser.add_argument("prompt", type=str, help="text to continue")
    parser.add_argument("--dense", metavar="MODEL", help="another model, whose text is shown on the left")
    parser.add_argument("--chat", action="store_true", help="hand the prompt to the model as a user's message, by the "
                        "chat template of its tokenizer: for models that are made to follow instructions")
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
    with reported(script, argv, "lower --max-new-tokens, or give --dtype bfloat16 or --device cpu") as command:
        given = vars(parser.parse_args(command.argv))
        check_between("--max-new-tokens", given["max_new_tokens"], 1)
        check_between("--temperature", given["temperature"], 0)
        check_between("--seed", given["seed"], 0, 2**64 - 1)
        if not given["prompt"]:
            raise InputError("prompt: is empty; give a text to continue")
        model, dense = given.pop("model"), given.pop("dense")
        check_model("model", model)
        check_model("--dense", dense or "")
        print_completions({"dense": dense, "model": model} if dense else {"model": model}, **given)
    return command.status


def print_completions(models: dict[str, str], prompt: str, chat: bool, device: str | None, dtype: str, bos: str,
                      **options: Any) -> None:
    """Print completions of models {title: name}, and how their speeds compare. options: further ones of `complete`."""
    from mixgpt.checkpoints.load import read_config
    from mixgpt.common.memory import free
    from mixgpt.common.runtime import choose_device, choose_dtype
    from mixgpt.datautils import resolve_bos
    from mixgpt.evaluation.generation import compare_speeds, complete  # These imports take seconds.
    place, completions, kept, config = choose_device(device), {}, [], read_config(models["model"])
    chosen, heading = choose_dtype(dtype, config, place), None if len(models) > 1 else prompt
    for title, name in models.items():
        loaded, tokenizer = mixgpt.load(name, place, config.dtype if chosen == "auto" else chosen)
        text, starts = prompt, resolve_bos(bos, loaded.config.model_type, tokenizer)
        if chat:
            if not tokenizer.chat_template:
                raise InputError(f"--chat: the tokenizer of model {name} has no chat template; leave it out")
            with reading(f"--chat: the chat template of model {name}"):
                text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                     add_generation_prompt=True)
        run = partial(complete, loaded, tokenizer, text, bos=starts, **options)
        completions[title] = run(heading=heading)
        if kept or 2 * completions[title].nbytes < free(place):
            kept.append(run)
        del loaded, run  # The next model gets its memory if there is not enough for both.
    if len(models) > 1:
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 20), 120)
        texts = {title: completion.text for title, completion in completions.items()}
        print(prompt, "", *side_by_side(texts, width), sep="\n")
    speeds = (f"{title} {each.tokens} tokens in {each.seconds:.1f} s, {each.rate:.1f} tokens/s after the first, "
              f"weights {each.nbytes / 1e6:.0f} MB" for title, each in completions.items())
    print("\n" + "; ".join(speeds) + f" on {place}")
    for title, name in models.items():
        if cut := completions[title].cut:
            print(f"warning  prompt: longer than the context of {name}, which reads it without its first {cut} tokens")
    if len(models) > 1:
        dense, other = completions.values()
        speed = "speeds not compared: too little memory for both models at once"
        if len(kept) > 1:
            ratio = compare_speeds(*kept, min(options["max_new_tokens"], 8), dense.seconds + other.seconds)
            speed = "speeds vary too much to compare" if math.isnan(ratio) else f"{ratio:.2f} times as fast"
        print(f"{speed}, {other.nbytes / dense.nbytes:.2f} times the memory")


def side_by_side(texts: dict[str, str], width: int) -> list[str]:
    """Return {title: text} as lines of at most `width` characters, in adjacent columns."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[title, "-" * each, *(
        part for line in text.strip("\n").expandtabs(4).splitlines()
        for part in textwrap.wrap(line, each, drop_whitespace=False, replace_whitespace=False) or [""])]
        for title, text in texts.items()]
    return [" | ".join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue="")]


if __name__ == "__main__":
    sys.exit(main("mixgpt generate"))
