"""Say in one line how much of SparseGPT's loss `best` saves, and in how many times its time.

python benchmarks/speedrun.py MODEL c4 --nsamples 32 --seqlen 512 --eval wikitext2 c4 code self --eval-limit 12

Further arguments are flags of the family scripts, for both runs, --sparsity .5 if none says how much to prune. Shares
are of the gap to the dense model: in log-perplexity, and in KL from it. Time leaves out loading and evaluation; the
model's own text is written anew. docs/results.md keeps a row of each commit that moved it.
"""

import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scores import NOT_PRUNING, parser_of, table_of_markdown

from mixgpt.app import pipeline
from mixgpt.app.cli import REMEDY, parse, reported
from mixgpt.common.choices import AGAIN
from mixgpt.common.files import cache_folder


def run_of(words):
    """Return perplexities {text: of the pruned model}, {text: of the dense one}, {text: KL}, seconds and the commit."""
    for file in cache_folder().glob("text-*"):  # The model's own text takes time.
        file.unlink()
    with contextlib.redirect_stdout(sys.stderr):
        record = pipeline.execute(parse("llama.py", words))
    dense, pruned = record["perplexity"].values()
    distance, = (of for model, of in record["distance"].items() if model != AGAIN)
    seconds = sum(value for part, value in record["seconds"].items() if part not in NOT_PRUNING)
    KL = {text: values["KL"] for text, values in distance.items()}
    return pruned, dense, KL, seconds, record["program"]["commit"]


def row_of(sparsegpt, best):
    """Return the cells of the line from what `run_of` gives for both, by column."""
    pruned, dense, KL, before, _ = sparsegpt
    cells = {"commit": (best[4] or "")[:12], "time": f"{best[3] / before:.1f}x"}
    for text in dense:
        gap, left = (math.log(of[text] / dense[text]) for of in (pruned, best[0]))
        cells[Path(text).name] = f"{1 - left / gap:.0%}, KL {best[2][text]:.3f} ({1 - best[2][text] / KL[text]:.0%})"
    return cells


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("speedrun.py", __doc__)
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", help="calibration text, as of the family scripts")
    with reported("speedrun.py", argv, REMEDY) as end:
        options, flags = parser.parse_known_args(argv)
        asked = {word.partition("=")[0] for word in flags}
        flags += [] if asked & {"--sparsity", "--prunen", "--wbits"} else ["--sparsity", ".5"]
        words = [options.model, options.dataset, *flags, "--dense", "--quiet", "--preset"]
        cells = row_of(*(run_of([*words, preset]) for preset in ("sparsegpt", "best")))
        print(table_of_markdown(list(cells), [list(cells.values())]))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
