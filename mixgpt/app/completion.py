"""Output of generate.py: completions of a prompt by one model, or by two side by side."""

import shutil
import sys

import transformers

from mixgpt.app.tables import side_by_side, wrapped
from mixgpt.common.runtime import choose_device
from mixgpt.evaluation.generation import complete, load
from mixgpt.text.bos import resolve

NARROWEST, WIDEST = 20, 120  # columns


def print_completions(models, prompt, device=None, dtype="auto", bos="auto", **options):
    """Print the completions of models {title: name}, run one after the other on a device.

    bos: of the command line. options: further ones of `complete`.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device, made = choose_device(device), {}
    for title, name in models.items():
        loaded, tokenizer = load(name, device, dtype)
        way = resolve(bos, loaded.config.model_type, tokenizer)
        made[title] = complete(loaded, tokenizer, prompt, bos=way, **options)
        del loaded  # before the next one is loaded
    for title, each in made.items():
        if each.cut:
            print(f"warning  prompt: longer than the context of {models[title]}, which reads it without its first "
                  f"{each.cut} tokens")
    width = max(NARROWEST, min(shutil.get_terminal_size((100, 24)).columns, WIDEST))
    print("\n".join(wrapped(prompt, width)), end="\n\n")
    if len(made) > 1:
        print(side_by_side({title: each.text for title, each in made.items()}, width))
    else:
        print("\n".join(wrapped(next(iter(made.values())).text, width)))
    print("\n" + "; ".join(f"{title} {each.speed}" for title, each in made.items()) + f" on {device}")
