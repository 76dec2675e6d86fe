"""Generate text with a saved model, optionally side by side with the dense one.

python generate.py pruned "The capital of France is"
python generate.py pruned "The capital of France is" --dense facebook/opt-125m --max_new_tokens 40
python generate.py SmolLM2-135M-Instruct.Q4_1.gguf "Once upon a time" --temperature 0.8 --seed 1

A model is a checkpoint saved by these scripts in any of their formats, a hub id, a local checkpoint or a .gguf file.
"""

import sys

from mixgpt.app import exit_status
from mixgpt.app.settings import BOS, MOST, Parser, check_model, check_seed, refuse_empty
from mixgpt.common.errors import InputError

COLDEST = 1e-6  # temperature; logits divided by less could leave float32


def _parse(argv):
    parser = Parser(prog="generate.py", allow_abbrev=False,
                    description="Generate text with a saved model, optionally side by side with the dense one.")
    parser.add_argument("model", help="folder of --save, hub id, local folder or .gguf file")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--dense", metavar="MODEL", help="another model, whose text is shown on the left")
    parser.add_argument("--max_new_tokens", type=int, default=64,
                        help="maximum number of tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="sampling temperature; 0: greedy decoding (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    parser.add_argument("--bos", default="auto", choices=["auto", *BOS],
                        help="whether the prompt begins with the token for the beginning of a text; each: also if it "
                             "is cut to the model's context; once: only at its own beginning; never; auto: each for "
                             "models that need it (Gemma), else what the tokenizer does by itself (default: auto)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="dtype of the weights in memory; auto: as stored, but float32 where a CPU is faster in it")
    given = parser.parse_args(argv)
    _check(given)
    return vars(given)


def _check(given):
    """Raise InputError for arguments that no model could use."""
    models = {"model": given.model, "--dense": given.dense}
    refuse_empty(models | {"--device": given.device})
    if not 1 <= given.max_new_tokens <= MOST:
        bound = "least 1" if given.max_new_tokens < 1 else f"most {MOST}"
        raise InputError(f"--max_new_tokens {given.max_new_tokens}: must be at {bound}")
    if not (given.temperature == 0 or COLDEST <= given.temperature < float("inf")):
        raise InputError(f"--temperature {given.temperature:g}: must be 0 (greedy) or at least {COLDEST:g}")
    check_seed(given.seed)
    if not given.prompt:
        raise InputError("prompt: is empty; give a text to continue")
    try:
        given.prompt.encode()
    except UnicodeEncodeError as error:  # bytes that Python could not decode, or half of a surrogate pair
        raise InputError(f"prompt: character {error.start + 1} is not text; give the prompt in UTF-8") from error
    for flag, name in models.items():
        if name:
            check_model(flag, name)


def main(argv=None):
    """Run the command line. Returns the exit status, see `exit_status.run`."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status.run("generate.py", argv, lambda: _run(argv), "lower --max_new_tokens, or give --dtype bfloat16")


def _run(argv):
    given = _parse(argv)
    from mixgpt.app.completion import print_completions  # slow import

    model, dense = given.pop("model"), given.pop("dense")
    print_completions({"dense": dense, "pruned": model} if dense else {"model": model}, **given)


if __name__ == "__main__":
    sys.exit(main())
