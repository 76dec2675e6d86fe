"""Tasks of EleutherAI's lm-eval, zero-shot or few-shot: build them, and score a model one decoder layer at a time.

Texts of all tasks pass through a layer together, so that it is loaded once for thousands of them.
Tokenization, windows and, up to rounding, results match lm-eval's own `hf` model, except that with --bos each
truncated texts and all windows also begin with BOS, and that no text ends with an EOS that the tokenizer adds.
"""

import contextlib
import io
import itertools
import numbers
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.dummy import DummyLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks.manager import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.common import distributed, memory, progress, runtime
from mixgpt.common.errors import InputError, reading
from mixgpt.common.hub import hub_reachable, silenced
from mixgpt.datautils import encode, token_ids
from mixgpt.evaluation.generation import complete
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.placing import in_turn, whole
from mixgpt.modeling.running import SLICE, StreamedModel

BOOTSTRAP = 1000  # Resamples for the standard error of a metric that is not a mean.
RESIDENT = 2**18  # So many tokens pass through a layer each time it is loaded.
PADDING = 16  # Lengths are padded to multiples of it, so that few distinct ones remain.


def load(names: Iterable[str], folder: str | None) -> dict[str, dict]:
    """Build lm-eval tasks, groups and tags, also of a folder, for `score`, and try them on a model that guesses."""
    if folder is not None and not any(Path(folder).glob("**/*.yaml")):
        raise InputError(f"--tasks-dir {folder}: must be a folder with .yaml files that describe tasks of lm-eval")
    chosen = {"tasks": {}, "groups": {}}
    hub_reachable()  # If not, libraries are offline from now on.
    with contextlib.redirect_stdout(io.StringIO()), silenced():  # lm-eval prints, too.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=folder)  # This takes seconds: lm-eval has thousands of tasks.
        for name in names:
            with reading(f"--tasks {name}: cannot be used"):
                try:
                    loaded = manager.load([name])
                except DatasetsError as error:
                    raise (error.__cause__ or error) from None  # The cause says what is wrong.
                _evaluate(DummyLM(), loaded, 0)  # This refuses tasks that run the model's code, or need images.
            chosen = {kind: chosen[kind] | loaded[kind] for kind in chosen}
    return chosen


def _evaluate(lm: TemplateLM, chosen: dict[str, dict], bootstrap: int) -> dict:
    """Return lm-eval's results of a model on the tasks from `load`."""
    for task in chosen["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # Without this, each model would get other examples.
    return evaluate(lm, chosen, bootstrap_iters=bootstrap, log_samples=False)


def check(chosen: dict[str, dict], tokenizer: PreTrainedTokenizerBase, nbytes: int, device: torch.device) -> None:
    """Raise InputError for tasks that need special tokens or memory (nbytes, for the whole model) that are missing."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("--tasks: the model's tokenizer has no token for the begin or the end of a text")
    for name, task in chosen["tasks"].items():
        kinds = {instance.request_type for instance in task.instances}
        if "generate_until" in kinds and nbytes > memory.free(device):
            raise InputError(f"--tasks {name}: generates text, for which all {nbytes / 1e9:.1f} GB of the model must "
                             f"fit in memory; {memory.free(device) / 1e9:.1f} GB are free on {device}")
        if any(instance.request_type == "loglikelihood" and not "".join(instance.args) for instance in task.instances):
            raise InputError(f"--tasks {name}: computes the likelihood of an empty text")


def score(chosen: dict[str, dict], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int,
          device: torch.device, bos: str | None = None) -> dict[str, dict]:
    """Score a model on the tasks from `load`.

    tokens: number per batch. Returns {task or group: {metric: value, metric_stderr: value, "examples": count,
    "num_fewshot": count, "version": lm-eval's}}; a metric behind a filter names it in parentheses.
    """
    lm, scores = StreamedLM(model, tokenizer, tokens, device, bos), {}
    with contextlib.redirect_stdout(io.StringIO()), silenced():
        results = _evaluate(lm, chosen, BOOTSTRAP)
    if lm.cut:
        print(f"warning  --tasks: {lm.cut} texts are longer than the model's {lm.max_length} tokens and lost their "
              "beginning", flush=True)
    for name, values in results["results"].items():
        metrics = scores[name] = {}
        for key, value in values.items():
            metric, comma, chain = key.partition(",")
            if comma and isinstance(value, numbers.Real):
                filtered = "" if chain == "none" else f" ({chain})"
                stderr = "_stderr" if metric.endswith("_stderr") else ""
                metrics[metric.removesuffix("_stderr") + filtered + stderr] = float(value)
        facts = {"examples": results["n-samples"].get(name, {}).get("effective"),
                 "num_fewshot": results["n-shot"].get(name), "version": results["versions"].get(name)}
        metrics |= {key: fact for key, fact in facts.items() if fact is not None}
    return scores


class StreamedLM(TemplateLM):
    """An lm-eval model that runs all texts, divided among processes, through one decoder layer after the other."""

    eot_token_id = prefix_token_id = None  # Token ids; the second precedes a text without context.

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, device: torch.device,
                 bos: str | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.where = tokens, device
        self.bos, self.first = bos, tokenizer.bos_token_id if bos == "each" else None
        self.max_length = runtime.position_limit(model.config) or runtime.DEFAULT_SEQLEN
        self.eot_token_id = tokenizer.eos_token_id
        self.prefix_token_id = self.eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.cut = 0  # The number of truncated texts.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return the ids of a text, with the tokenizer's special tokens, but EOS, unless it begins with BOS."""
        if add_special_tokens is None:
            return token_ids(self.tokenizer, string, self.bos, goes_on=True)
        return encode(self.tokenizer, string, add_special_tokens=add_special_tokens).input_ids

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in windows of maximum length, each token counted once."""
        windows = []  # (number of the request, context, continuation)
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])[self.first is not None:]  # The prefix is BOS.
            windows += [(number, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1)]
        totals = [0.0] * len(requests)
        for (number, *_), (likelihood, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the completions by the model, entirely on its device; one text at a time."""
        mine = range(distributed.rank(), len(requests), distributed.world())
        texts = {}
        with whole(self.model, self.where):
            for number in progress.bar(mine, title="tasks", unit="text", leave=False):
                context, options = requests[number].args
                options = normalize_gen_kwargs(options)
                texts[number] = complete(
                    self.model, self.tokenizer, context, min(options["max_gen_toks"], self.max_length - 1),
                    options.get("temperature", 1.0) if options["do_sample"] else 0.0, number,  # Repeats differ.
                    [end for end in options["until"] if end], bos=self.bos).text
        return self._in_order(texts)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: object) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether all tokens are the likeliest) of (_, context, continuation) as token ids."""
        requested = defaultdict(list)  # {tokens, read once: [(number of a request, its tokens to predict at the end)]}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-self.max_length - 1:]
            self.cut += len(tokens) < len(context) + len(continuation)
            tokens[0] = tokens[0] if self.first is None else self.first
            requested[tuple(tokens[:-1])].append((number, continuation[-self.max_length:]))
        longest_first = sorted(requested, key=len, reverse=True)  # Running out of memory then shows at once.
        sequences, answers = longest_first[distributed.rank()::distributed.world()], {}
        while sequences:
            count = max(RESIDENT // len(sequences[0]), 1)
            resident, sequences = sequences[:count], sequences[count:]
            streams = []
            for T, alike in itertools.groupby(resident, lambda tokens: min(
                    -(-len(tokens) // PADDING) * PADDING, self.max_length)):
                # Attention is causal: padding at the end does not affect the tokens before it.
                padded = torch.tensor([[*tokens, *[0] * (T - len(tokens))] for tokens in alike])
                streams.append(StreamedModel(self.model, self.where, max(self.tokens // T, 1)).embed(padded))
            for index, layer in in_turn(layers_of(self.model), self.where, "tasks"):
                for stream in streams:
                    stream.advance(layer, index)
            with streams[0].head(self.model) as head:
                rows = itertools.chain.from_iterable(stream.hidden for stream in streams)
                for row, tokens in zip(rows, resident, strict=True):
                    for number, continuation in requested[tokens]:
                        labels, likelihood, greedy = torch.tensor(continuation, device=self.where), 0.0, True
                        hidden = row[len(tokens) - len(labels):len(tokens)].to(self.where)
                        for h, label in zip(hidden.split(SLICE), labels.split(SLICE), strict=True):
                            scores = head(h).float().log_softmax(-1)  # (n, vocabulary)
                            likelihood += scores.gather(1, label[:, None]).sum().item()
                            greedy = greedy and torch.equal(scores.argmax(-1), label)
                        answers[number] = likelihood, greedy
        return self._in_order(answers)

    def _in_order(self, answers: dict[int, object]) -> list:
        """Return the answers of all processes, {number: answer}, as a list."""
        together = ChainMap(*distributed.all_gather_object(answers))
        return [together[number] for number in range(len(together))]
