"""Time generation with packed models against the dense one, in alternation, with several sequences at once.

python benchmarks/serving.py DENSE PACKED... --output docs/accuracy/serving.json
.venv-vllm/bin/python benchmarks/serving.py DENSE PACKED... --output docs/accuracy/serving.json --engine vllm

DENSE: a folder, or for transformers anything that `mixgpt generate` takes. PACKED: folders of --save. vLLM is where
`make serve-test` has installed it. For each PACKED and number of sequences the file has a cell: medians of tokens per
second, the ratio of each round, and for transformers the bytes of all weights in memory. `tables.py` writes them into
docs/speed.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import mixgpt
from mixgpt.app.cli import Parser, reported
from mixgpt.common.errors import reading
from mixgpt.common.files import write_output
from mixgpt.common.program import commit

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING", "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}


def transformers(name, dtype):
    """Return a function of (sequences, tokens), which generates with a model, and the bytes of its weights."""
    model, tokenizer = mixgpt.load(name, "cpu", getattr(torch, dtype))
    ids = torch.tensor([tokenizer("The")["input_ids"]])

    def generate(sequences, tokens):
        prompts = ids.expand(sequences, -1)
        model.generate(prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=tokens, max_new_tokens=tokens,
                       do_sample=False, pad_token_id=0)
    return generate, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def vllm(name, dtype):
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    # All are in this process: an engine in a process of its own computes, or waits in a loop, beside the others.
    engine = LLM(name, dtype=dtype, max_model_len=512, max_num_seqs=64)

    def generate(sequences, tokens):
        engine.generate(["The"] * sequences, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
                        use_tqdm=False)
    return generate, None


ENGINES = {"transformers": transformers, "vllm": vllm}


def target_of(folder):
    """Return what a saved model was pruned to, such as "2:4" or "50% + 4 bit"."""
    with reading(f"PACKED {folder}: is no folder of --save"):
        record = json.loads((Path(folder) / "mixgpt.json").read_text())
    n, m, wbits = (record["settings"][name] for name in ("prunen", "prunem", "wbits"))
    return (f"{n}:{m}" if n else f"{record['sparsity']:.0%}") + (f" + {wbits} bit" if wbits < 16 else "")


def rate(generate, sequences, tokens):
    start = time.perf_counter()
    generate(sequences, tokens)
    return sequences * tokens / (time.perf_counter() - start)


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="serving.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--output", required=True, help=".json file, to which cells are added")
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="bfloat16", help="of both models (default: bfloat16)")
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="after one that does not count (default: 7)")
    with reported("serving.py", argv, "give fewer PACKED at a time") as end:
        options = parser.parse_args(argv)
        targets, output = [target_of(folder) for folder in options.packed], Path(options.output)
        with reading(f"--output {output}: holds no cells of this benchmark"):
            cells = json.loads(output.read_text())["cells"] if output.exists() else []
        (dense, dense_bytes), *others = (ENGINES[options.engine](name, options.dtype)
                                          for name in (options.dense, *options.packed))
        for target, (packed, nbytes) in zip(targets, others, strict=True):
            for sequences in options.sequences:
                _, *rounds = [[rate(generate, sequences, options.tokens) for generate in (dense, packed)]
                              for _ in range(1 + options.rounds)]
                cells.append({"model": options.dense, "method": options.engine, "target": target,
                              "sequences": sequences, "threads": torch.get_num_threads(), "commit": commit(),
                              "rates": [statistics.median(each) for each in zip(*rounds, strict=True)],
                              "ratios": [after / before for before, after in rounds], "bytes": [dense_bytes, nbytes]})
                print(target, sequences, cells[-1]["rates"], cells[-1]["ratios"], flush=True)
                write_output("--output", output, json.dumps({"cells": cells}, indent=1) + "\n")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
