"""Check that the hub is asked once, quickly, and that a lack of it is recognised."""

import socket

import datasets
import pytest
from huggingface_hub import constants, utils

import mixgpt
from mixgpt.common.errors import InputError
from mixgpt.common.hub import hub_reachable


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    for options in (constants, datasets.config):
        monkeypatch.setattr(options, "HF_HUB_OFFLINE", False)
    hub_reachable.cache_clear()
    yield
    hub_reachable.cache_clear()


def test_the_client_of_the_hub_is_asked_once(monkeypatch):
    """It knows proxies and certificates; here nothing listens at the address itself."""
    asked = []

    class Client:
        def head(self, url, timeout):
            asked.append((url, timeout))

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(utils, "get_session", Client)
    assert hub_reachable() and hub_reachable()
    assert asked == [("http://127.0.0.1:9", 5)]


def test_the_next_run_asks_again_where_the_hub_did_not_answer_in_time(monkeypatch):
    asked = []
    monkeypatch.setattr(utils, "get_session", lambda: asked.append(constants.HF_HUB_OFFLINE))  # None has no head
    for run in (mixgpt.load, lambda model: mixgpt.prune(model, "ptb", sparsity=0.5)):
        with pytest.raises(InputError, match="the hub cannot be reached"):
            run("owner/nowhere")
        assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE
    assert asked == [False, False]


def test_where_nothing_listens_the_hub_is_not_reachable(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_reachable() and not hub_reachable()
    assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE  # from now on


def test_in_offline_mode_the_hub_is_not_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_reachable()
        with pytest.raises(BlockingIOError):
            server.accept()
