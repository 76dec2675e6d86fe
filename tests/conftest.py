"""Tiny models of every family, a tokenizer, and a model that has learned something, all made here."""

import copy
import errno
import gzip
import json
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the tests need no network
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: workers share the cores

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU then

import pyarrow.parquet
import pytest
import transformers
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mixgpt import datautils
from mixgpt.allocation.plan import Budget
from mixgpt.app import cli, opening
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common.choices import ALLOCATIONS
from mixgpt.evaluation.measures import Survey
from mixgpt.kernels import columns
from mixgpt.kernels.rounding import Levels, UniformGrid
from mixgpt.modeling.baichuan import BaichuanConfig, BaiChuanForCausalLM, BaichuanForCausalLM
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.running import StreamedModel

for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as in the background, or under nohup; processes would inherit it
        signal.signal(number, action)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they and what they start share the processor's cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

ROOT = Path(__file__).parent.parent
ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []  # marks of what runs on a real GPU where there is one
VOCABULARY = 384
CPU = torch.device("cpu")


def slow_but(first, values):
    """Mark the values of a parameter as slow, but some."""
    return [value if value in first else pytest.param(value, marks=pytest.mark.slow) for value in values]


def pytest_addoption(parser):
    parser.addoption("--every-combination", action="store_true",
                     help="run test_cuda.py on each family, job, dtype and room, not only on all pairs of these")


COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
          "initializer_range": 0.2}
TOKEN_IDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}


def _llama(kind, config="Config", **options):
    """Build a model of one of the classes of transformers that are like LLaMA."""
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, kind + config)(**COMMON | options))


def _gemma3():
    text = COMMON | TOKEN_IDS | {"num_hidden_layers": 2, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCABULARY - 1))


def _opt(hidden_size=32, **options):
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, init_std=0.2, **options))


def _bloom(hidden_size=32):
    return transformers.BloomForCausalLM(transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, n_layer=3, n_head=4, initializer_range=0.2))


FAMILIES = {
    "opt": lambda: _opt(word_embed_proj_dim=32),
    "opt-350m": lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "llama": lambda: _llama("Llama", tie_word_embeddings=True),
    "mistral": lambda: _llama("Mistral", sliding_window=8),
    "qwen2": lambda: _llama("Qwen2", use_sliding_window=True, sliding_window=8,
                            max_window_layers=1),  # the layers have different masks
    "qwen3": lambda: _llama("Qwen3"),
    "bloom": _bloom,
}

for name, kind, options in [
        ("baichuan-7b", BaiChuanForCausalLM, {"max_position_embeddings": 128}),
        ("baichuan-13b", BaichuanForCausalLM, {"model_max_length": 128})]:
    FAMILIES[name] = lambda kind=kind, options=options: kind(BaichuanConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        initializer_range=0.2, **options))


OTHERS = {  # stand-ins for the README's commands; modeling/test_decoders.py and test_experts.py have many more
    "gemma3": _gemma3,
    "gemma2": lambda: _llama("Gemma2", sliding_window=8),
    # its layers take inputs that depend on the tokens; the last two the keys and values of the first two
    "gemma4": lambda: _llama(
        "Gemma4", config="TextConfig", num_hidden_layers=4, global_head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2)),
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**COMMON)),
    "qwen3-moe": lambda: _llama("Qwen3Moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    # wide enough for kernels to multiply their packed matrices
    "wide llama": lambda: _llama("Llama", hidden_size=64, intermediate_size=128, head_dim=16),
    "wide opt": lambda: _opt(hidden_size=64, word_embed_proj_dim=64),
    "wide bloom": lambda: _bloom(hidden_size=64),
}


def make(name):
    """Build the tiny random model of a name in FAMILIES or OTHERS."""
    torch.manual_seed(0)
    return (FAMILIES | OTHERS)[name]().eval()


@pytest.fixture(params=FAMILIES)
def tiny(request):
    """Give a model of every kind in turn."""
    return make(request.param)


@pytest.fixture
def tokens():
    """Five random sequences of 24 tokens: batches of 4 leave a remainder."""
    return torch.randint(0, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer(once):
    """A byte-level BPE tokenizer trained on the builtin text; it puts <s> in front, as LLaMA's does."""
    return PreTrainedTokenizerFast.from_pretrained(once("tokenizer", train_tokenizer))


@pytest.fixture(scope="session")
def plain(tokenizer):
    """Give this tokenizer, but so that it adds no BOS by itself."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    return changed


def train_tokenizer(path):
    """Save what `tokenizer` gives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(datautils.load_rows("builtin", "train", None)[0][:500], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)


@pytest.fixture(scope="session")
def model_folder(tokenizer, once):
    """Return a function that gives the folder of a saved model by a name and what builds it."""
    def save(build, path):
        transformers.utils.logging.disable_progress_bar()  # or the test that comes first would see it
        build().save_pretrained(path)
        tokenizer.save_pretrained(path)

    return lambda name, build: once(f"checkpoint-{name}", partial(save, build))


@pytest.fixture(scope="session")
def checkpoint_folder(model_folder):
    """Return a function that gives the folder of a saved tiny model by its name in FAMILIES."""
    return lambda name: model_folder(name, lambda: make(name))


@pytest.fixture
def folder(request, model_folder):
    """Return a function that gives the folder of a saved model by what `build` in the file of the test takes."""
    module = request.module
    return lambda kind: model_folder(f"{module.__name__}-{kind}", partial(module.build, kind))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Give a folder with a few lines of every dataset, named as docs/running.md says."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"The {number} sheep of the village graze on the hill behind the mill all day ." for number in range(9)]
    for split in ("train", "test"):
        for name, column in ((f"wikitext-2-raw-v1/{split}-00000-of-00001", "text"),
                             (f"penn_treebank/{split}/0000", "sentence")):
            (file := folder / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table({column: lines}), file)
    (folder / "en").mkdir()
    for name in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"):
        with gzip.open(folder / "en" / name, "wt") as file:
            file.writelines(json.dumps({"text": " ".join(lines)}) + "\n" for _ in range(4))
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return a function that gives a path that `make` has written to, in one of several workers of pytest-xdist.

    As its documentation has it ("Making session-scoped fixtures execute only once").
    """
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent  # the folder of the whole run

    def once(name, make):
        path = root / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = root / f"{name}.partial"
                make(partial)
                partial.rename(path)
        return path

    return once


def assert_same_weights(folder, other):
    """Assert that two saved folders have the same tensors, bit for bit."""
    one, two = saved_tensors(folder), saved_tensors(other)
    assert one.keys() == two.keys()
    assert not [key for key, tensor in one.items() if not torch.equal(tensor, two[key])]


def modules_of(model):
    """Return {(layer, name): module} of all linears in the layers."""
    return {(index, name): module for index, layer in enumerate(layers_of(model))
            for name, module in linears(layer).items()}


@torch.no_grad()
def inputs_of(model, modules, tokens):
    """Return {key: inputs (tokens, in)} of modules, {key: module}, in one run of the whole model."""
    inputs = {}
    with hooked({module: lambda X, key=key: inputs.update({key: X.reshape(-1, X.shape[-1])})
                 for key, module in modules.items()}):
        model(tokens, use_cache=False)
    return inputs


def make_plan(selected, target, way="uniform", sensitivity=None, alpha=0.0):
    """Say how sparse each matrix shall be, by the name of an allocation."""
    return ALLOCATIONS[way].load()(Budget(selected, target, alpha, sensitivity))


def saved_tensors(path):
    """Return {key: tensor} of all safetensors files of a folder."""
    return {key: tensor for file in Path(path).glob("*.safetensors") for key, tensor in load_file(file).items()}


def save(path, model, tokenizer, record, save_format="dense", grids=None):
    """Save a model in memory as a run does at its end."""
    with RunDir(path, save_format) as folder:
        folder.open(model, {})
        folder.write_checkpoint(tokenizer, grids or {}, record)
        folder.publish()
        folder.close()


@pytest.fixture
def prune(checkpoint_folder, capsys, monkeypatch, tmp_path_factory):
    """Return a function that runs the command line of a name in FAMILIES or OTHERS on its tiny model and little text.

    It takes words, and strings of several; of flags that are given twice the last counts. Returns what it printed or,
    with another status, said on stderr.
    """
    from commands import SMALL, run  # which import this module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    read_little(monkeypatch)

    def prune(name, *options, model=None, data="builtin", status=0):
        words = [word for option in options for word in str(option).split()]
        capsys.readouterr()
        assert run("llama.py", model or checkpoint_folder(name), data, *SMALL, *words) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return prune


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def record_of(folder):
    """Return the record that a run has saved in a folder."""
    return json.loads((Path(folder) / "mixgpt.json").read_text())


@pytest.fixture(scope="session")
def fork():
    """Give a function that starts another one in a process, forked from one that has imported all it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "mixgpt.app.pipeline"])
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))  # it does not know sys.path
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("FORK_SERVER", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # a process that has asked for GPUs cannot fork ones that use them
        forkserver.ensure_running()

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def read_little(patch):
    """Let runs in this process read a part of the texts, and evaluate on four segments. patch: a pytest.MonkeyPatch."""
    rows, tests = datautils.load_rows, datautils.test_tokens
    patch.setattr(datautils, "load_rows", lambda *asked: (lambda found, source: (found[:50], source))(*rows(*asked)))
    patch.setattr(opening, "test_tokens", lambda *asked, **more: (
        lambda tokens, source: (tokens[:4], source))(*tests(*asked, **more)))


def command(name, arguments, log, prepare=None, given=()):
    """Run the command line of a name in FAMILIES on short texts, for `fork`, with its output in `log`.

    prepare: called with `given` before, for example to break the world.
    """
    with open(log, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    torch.set_num_threads(1)
    read_little(pytest.MonkeyPatch())
    if prepare:
        prepare(*given)
    status = cli.main("llama.py", [str(argument) for argument in arguments])
    sys.stdout.flush()
    sys.exit(status)


def as_rank(rank, world, port):
    """Be process `rank` of as many as torchrun would have started."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_together(fork, words, logs, prepare=as_rank, more=()):
    """Run LLaMA's command line in as many processes as there are logs. Returns what they say, and the one's status."""
    port = free_port()
    processes = [fork(command, "llama", words, log, prepare, (rank, len(logs), port, *more))
                 for rank, log in enumerate(logs)]
    for process in processes:
        process.join(600)
    statuses = {process.exitcode for process in processes}
    return [log.read_text() for log in logs], statuses.pop() if len(statuses) == 1 else statuses


def contents(folder):
    """Return {name: what must be the same in two runs} of all files of a saved folder."""
    folder, found = Path(folder), {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    record = json.loads(found.pop("mixgpt.json"))
    found.pop("README.md", None)  # which names the folder and the command
    for key in ("seconds", "peak_memory"):
        record.pop(key, None)
    for key in ("save", "resume", "sensitivity_file"):
        record["settings"].pop(key)
    return found | {"mixgpt.json": record}


def load_compiled():
    """Load the compiled walk over columns from its cache, which takes most of the time of a tiny run."""
    for grid in (None, UniformGrid(*torch.ones(3, 2), torch.float32), Levels.between(torch.ones(4, 2))):
        columns.walk_compiled(torch.ones(4, 2), torch.zeros(4, 2), torch.ones(4, 4), torch.zeros(4, 2) > 0, None, grid)


if os.environ.pop("FORK_SERVER", None):  # this is the process that others are forked from
    load_compiled()


def measure_sparsity(model):
    """Count the zeros of every linear of every decoder layer, on the host. Returns a list of `MatrixSparsity`."""
    return Survey(StreamedModel(model, CPU, 1)).finish()[0][0]


def logits(model, tokens, batch_size, device):
    """Return the logits (N, T, vocabulary) of tokens (N, T) on the host, streamed."""
    return Survey(StreamedModel(model, device, batch_size), tokens).finish()[1]
