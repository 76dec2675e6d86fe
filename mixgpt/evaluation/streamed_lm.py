"""An lm-eval model whose likelihoods are computed one decoder layer at a time.

The texts of all tasks pass through the layers together, so that a layer is loaded once for thousands of them.
Tokenization, windows and, up to rounding, results match lm-eval's own `hf` model, except that with --bos each
truncated texts and all windows also begin with BOS.
"""

import itertools
from collections import defaultdict

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mixgpt.common import distributed, progress
from mixgpt.common.runtime import DEFAULT_SEQLEN, position_limit
from mixgpt.evaluation.generation import complete
from mixgpt.text.bos import encode, first_token, token_ids
from modelutils import SLICE, HiddenStates, run_layers, whole

RESIDENT = 2**18  # tokens whose hidden states are in memory at a time
PADDING = 16  # lengths are padded to multiples of it, so that few distinct ones remain


class StreamedLM(TemplateLM):
    """An lm-eval model that runs all texts through one decoder layer after the other.

    Texts are divided among the processes; every process gets all answers.
    """

    def __init__(self, model, family, tokenizer, tokens, device, bos=None):
        super().__init__()
        self.model, self.family, self.tokenizer = model, family, tokenizer
        self.tokens, self.where = tokens, device
        self.bos, self.first = bos, first_token(tokenizer, bos)
        self.max_length = position_limit(model.config) or DEFAULT_SEQLEN
        self.cut = 0  # number of truncated texts

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        """The token that precedes a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Return the ids of a text, with the tokenizer's special tokens unless it begins with BOS."""
        if add_special_tokens is None:
            return token_ids(self.tokenizer, string, self.bos)
        return encode(self.tokenizer, string, add_special_tokens=add_special_tokens).input_ids

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Return the log-likelihood of each text in windows of maximum length, each token counted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])[self.first is not None:]  # the prefix is BOS
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Return the completions by the model, entirely on its device; one text at a time."""
        mine = range(distributed.rank(), len(requests), distributed.world())
        texts = {}
        with whole(self.model, self.family, self.where):
            for number in progress.bar(mine, title="tasks", unit="text", leave=False):
                context, options = requests[number].args
                until, most = options.get("until") or [], options.get("max_gen_toks", 256)
                temperature = options.get("temperature") or 1.0 if options.get("do_sample") else 0.0
                texts[number] = complete(self.model, self.tokenizer, context, min(most, self.max_length - 1),
                                         temperature, until=[until] if isinstance(until, str) else until,
                                         bos=self.bos).text
        return self._in_order(texts)

    def _loglikelihood_tokens(self, requests, **_):
        """Return (log-likelihood, whether all tokens are the likeliest) of (_, context, continuation) as token ids.

        Requests with the same input share a forward pass.
        """
        runs = defaultdict(list)  # input tokens -> [(request number, tokens to predict at its end)]
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-self.max_length - 1:]
            self.cut += len(tokens) < len(context) + len(continuation)
            tokens[0] = tokens[0] if self.first is None else self.first
            runs[tuple(tokens[:-1])].append((number, continuation[-self.max_length:]))
        longest_first = sorted(runs, key=len, reverse=True)  # so that running out of memory shows at once
        answers = {}
        for group in self._groups(longest_first[distributed.rank()::distributed.world()]):
            answers |= self._answers(group, runs)
        return self._in_order(answers)

    def _groups(self, sequences):
        """Yield {padded length: sequences} of at most RESIDENT tokens, or of one sequence."""
        group, size = defaultdict(list), 0
        for tokens in sequences:
            T = min(-(-len(tokens) // PADDING) * PADDING, self.max_length)
            if size and size + T > RESIDENT:
                yield group
                group, size = defaultdict(list), 0
            group[T].append(tokens)
            size += T
        if group:
            yield group

    @torch.no_grad()
    def _answers(self, group, runs):
        """Return {number of a request: answer}. group: {padded length: token sequences}."""
        # causal attention: padding at the end does not affect the tokens before it
        streams = [HiddenStates.embed(self.model, self.family,
                                      torch.tensor([[*tokens, *[0] * (T - len(tokens))] for tokens in sequences]),
                                      max(1, self.tokens // T), self.where) for T, sequences in group.items()]
        run_layers(self.model, self.family, streams, self.where, "tasks")
        answers = {}
        with streams[0].head(self.model, self.family) as head:
            for stream, sequences in zip(streams, group.values(), strict=True):
                answers |= _read(stream, head, [(row, len(tokens), *request) for row, tokens in enumerate(sequences)
                                                for request in runs[tokens]])
        return answers

    def _in_order(self, answers):
        """Return the answers of all processes, {number: answer}, as a list."""
        together = dict(itertools.chain.from_iterable(part.items() for part in distributed.all_gather_object(answers)))
        return [together[number] for number in range(len(together))]


def _read(stream, head, wanted):
    """Return {number: (log-likelihood, whether greedy decoding gives it)} from the last layer's hidden states.

    wanted: list of (row, length without padding, number, token ids that end one token after that length).
    """
    spots = torch.tensor([(row, length - len(targets) + place, target) for row, length, _, targets in wanted
                          for place, target in enumerate(targets)]).view(-1, 3)
    likelihoods, greedy = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for rows, columns, targets in (part.unbind(1) for part in spots.split(SLICE)):
        hidden = stream.hidden[rows.to(stream.hidden.device), columns.to(stream.hidden.device)].to(stream.device)
        scores = head(hidden).float().log_softmax(-1).cpu()  # (n, vocabulary)
        likelihoods.append(scores.gather(1, targets[:, None])[:, 0])
        greedy.append(scores.argmax(-1) == targets)
    counts = [len(targets) for *_, targets in wanted]
    return {number: (likelihood.sum().item(), same.all().item()) for (_, _, number, _), likelihood, same in zip(
        wanted, torch.cat(likelihoods).split(counts), torch.cat(greedy).split(counts), strict=True)}
