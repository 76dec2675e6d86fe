"""Compare methods by perplexity at equal sparsity, with this program's own command line and the same calibration text.

python benchmarks/accuracy.py MODEL c4 --output accuracy.json --nsamples 32 --seqlen 512 --eval-limit 40

Every method is run at every target with every seed, and the dense model once. Further arguments are flags of the family
scripts, for all runs. A benchmark that was interrupted goes on when it is started again; methods, targets and seeds can
be added. sparsegpt, mixgpt and best are presets of this project, sparsegpt-76 reads four sequences more than best with
32 at 50%, best-3 is best with an effort of 3. Wanda and OWL are peers, OWL with SparseGPT's walk. OWL is left out in
n:m: its paper mixes several n, here all matrices prune the same. Sensitivities are measured once a seed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from peers import PEERS, registered
from scores import DENSE, Scores, cell_of, parser_of
from tables import TIMED, Measured

from mixgpt.app.cli import REMEDY, reported

METHODS = PEERS | {"sparsegpt": "--preset sparsegpt", "sparsegpt-76": "--preset sparsegpt --nsamples 76",
                   "mixgpt": "--preset mixgpt", "best": "--preset best"}
FLAGS = METHODS | {name: f"--preset best --effort {name[5:]}" for name in TIMED if name.startswith("best-")}
WALKS = ("owl", "sparsegpt", "sparsegpt-76", "mixgpt")  # which quantize with the options of best
TARGETS = ("50%", "60%", "70%", "2:4", "4:8", "50%+4bit")
DEFAULTS = ["--nsamples", "32", "--seqlen", "512", "--eval", "wikitext2", "c4", "--dtype", "float32"]


def cells_of(options, flags):
    """Return all cells, the dense model's first. flags: words of the command line for all runs."""
    words = [options.model, options.dataset, *DEFAULTS, *flags]
    pairs = [(method, target) for target in options.targets for method in options.methods
             if not (":" in target and method.startswith("owl"))]
    return [cell_of(words, *DENSE, 0, ""), *(cell_of(words, method, target, seed, FLAGS[method] + (
        " --mse --act-order" if "bit" in target and method in WALKS else "")) for seed in dict.fromkeys(options.seeds)
        for method, target in pairs)]


def markdown(cells):
    """Write the tables of `Measured`: means over the seeds and costs, standard deviations, gaps closed, and efforts."""
    return "\n\n".join(Measured(Path(cells[0]["model"]).name, cells).tables().values()) if cells else ""


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("accuracy.py", __doc__)
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", help="calibration text, as of the family scripts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=FLAGS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", required=True, help=".json file of the cells; the tables go beside it, in .md")
    with reported("accuracy.py", argv, REMEDY) as end, registered():
        options, flags = parser.parse_known_args(argv)
        print(Scores(options.output, markdown).run(cells_of(options, flags)))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
