"""Say which matrices a pruned model's distance from the dense one comes from: swap them into the dense model in turn.

python benchmarks/attribution.py MODEL PRUNED wikitext2 --nsamples 4 --seqlen 128

Each row of the table is a kind of matrix, each column a third of the layers: the sum of the KL from the dense model
that each matrix of these gives alone, in thousandths of a nat per token. In brackets: the same with noise of equal norm
in each row. Matrices to and from values are swapped together and without noise, as their heads may be rotated. Below
stand the sum over all and the KL of the pruned model itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scores import parser_of, table_of_markdown
from tqdm import tqdm

from mixgpt.app.cli import REMEDY, reported
from mixgpt.checkpoints.load import load_model, load_tokenizer
from mixgpt.common.runtime import seeded
from mixgpt.datautils import test_tokens
from mixgpt.evaluation.distance import Distance
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import linears
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.rotation import OUTPUTS, VALUES

THIRDS = "first third", "second third", "last third"


def units_of(names):
    """Return lists of linears that are swapped together, by the name of their kind."""
    ends = {name: name.rpartition(".")[2] for name in names}
    heads = [name for name, end in ends.items() if end in VALUES or end in OUTPUTS and "mlp" not in name]
    units = {}
    for name, end in ends.items():  # Experts have many of one kind.
        units.setdefault(" + ".join(ends[head] for head in heads) if name in heads else end, []).append(name)
    return units


def noisy(W, W_hat, generator):
    """Return W with normal noise whose rows have the norms of W − Ŵ."""
    noise = torch.randn(W.shape, generator=generator)
    norms = torch.linalg.vector_norm((W - W_hat).float(), dim=1, keepdim=True)
    return (W + norms * noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)).to(W.dtype)


class Swaps:
    """KL of the dense model with other weights in some linears of a layer, from its own hidden states before it."""

    @torch.no_grad()
    def __init__(self, model, tokens):
        self.model, self.layers, self.distance = model, layers_of(model), Distance()
        self.stream = StreamedModel(model, torch.device("cpu"), len(tokens)).embed(tokens)
        self.before = []
        for index, layer in enumerate(self.layers):
            self.before.append(self.stream.hidden.clone())
            self.stream.advance(layer, index)
        with self.stream.head(model) as head:
            self.distance.keep("text", head, self.stream)

    @torch.no_grad()
    def divergence(self, changes, first):
        """Return the KL with weights {(layer, name): W}, of which the first layer is `first`."""
        own = {key: linears(self.layers[key[0]])[key[1]].weight for key in changes}
        kept = {key: weight.detach().clone() for key, weight in own.items()}
        for key, W in changes.items():
            own[key].copy_(W)
        self.stream.hidden = self.before[first].clone()
        for index in range(first, len(self.layers)):
            self.stream.advance(self.layers[index], index)
        for key, W in kept.items():
            own[key].copy_(W)
        with self.stream.head(self.model) as head:
            self.distance.compare("text", head, self.stream)
        return self.distance.result()["text"]["KL"]


def attribute(dense, pruned, tokens):
    """Return {(kind, layer): [KL of the pruned matrices alone, of noise if any]}, and the KL of all together."""
    swaps, generator, found = Swaps(dense, tokens), seeded(0, "noise"), {}
    pairs = [(index, *map(linears, layers)) for index, layers in enumerate(
        zip(layers_of(dense), layers_of(pruned), strict=True))]
    for index, before, after in tqdm(pairs, desc="layers", disable=None):
        for kind, names in units_of(before).items():
            weights = {(index, name): after[name].weight.detach() for name in names}
            noise = {key: noisy(before[key[1]].weight.detach(), W, generator) for key, W in weights.items()
                     if " + " not in kind}
            found[kind, index] = [swaps.divergence(changed, index) for changed in (weights, noise) if changed]
    everything = {(index, name): module.weight.detach() for index, _, after in pairs for name, module in after.items()}
    return found, swaps.divergence(everything, 0)


def rows_of(found, whole):
    """Return the rows of the table, by kind, and two at its end."""
    count = 1 + max(layer for _, layer in found)

    def cell(chosen):
        alone, *noise = (1000 * sum(values) for values in zip(*chosen, strict=True)) if chosen else ("",)
        return alone and f"{alone:.1f}" + "".join(f" ({value:.1f})" for value in noise)

    rows = [[kind, *(cell([value for (other, layer), value in found.items()
                           if other == kind and 3 * layer // count == third]) for third in range(3)),
             cell([value for (other, _), value in found.items() if other == kind])]
            for kind in dict.fromkeys(kind for kind, _ in found)]
    return [*rows, ["all, summed", "", "", "", cell([values[:1] for values in found.values()])],
            ["all together", "", "", "", f"{1000 * whole:.1f}"]]


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("attribution.py", __doc__)
    parser.add_argument("model", help="the dense model: hub id, local folder or .gguf file")
    parser.add_argument("pruned", help="folder of the pruned one, in any save format")
    parser.add_argument("dataset", help="text on which predictions are compared, as of the family scripts")
    parser.add_argument("--nsamples", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--dtype", default="bfloat16", help="of both models (default: bfloat16)")
    with reported("attribution.py", argv, REMEDY) as end:
        options = parser.parse_args(argv)
        dense, pruned = (load_model(model, getattr(torch, options.dtype)) for model in (options.model, options.pruned))
        tokens, _ = test_tokens(options.dataset, options.seqlen, load_tokenizer(options.model))
        tokens = tokens[:options.nsamples]
        print(table_of_markdown(["kind", *THIRDS, "all layers"], rows_of(*attribute(dense, pruned, tokens))))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
