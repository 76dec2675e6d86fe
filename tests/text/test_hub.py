"""Check that the hub is asked once, quickly, and that a lack of it is recognised."""

import http.server
import sys
import threading

import pytest
from huggingface_hub import constants
from tqdm import tqdm

from mixgpt.text import hub


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.fixture
def hub_of(monkeypatch):
    """Give a function that starts a hub which answers with a status, and returns the list of what it is asked for."""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        asked = []
        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{servers[0].server_port}")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_is_an_answer_and_is_asked_for_once(status, hub_of):
    asked = hub_of(status)
    assert hub.reachable() and hub.reachable()
    assert len(asked) == 1


def test_no_answer_is_recognised(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.reachable()


def test_in_offline_mode_the_hub_is_not_asked(monkeypatch, hub_of):
    asked = hub_of(200)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable() and not asked


def test_what_the_client_of_the_hub_can_reach_is_reachable(monkeypatch):
    """With a proxy or certificates that only the client knows: here nothing listens at the address itself."""
    class Client:
        def head(self, url, timeout):
            assert url == "http://127.0.0.1:9" and timeout <= 5

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "get_session", Client, raising=False)
    assert hub.reachable()


def test_bars_are_kept_off_where_there_is_no_terminal_and_other_lines_pass(capsys):
    with pytest.raises(KeyError), hub.barred():
        for _ in tqdm(range(3), desc="bar"):
            pass
        print("a line", file=sys.stderr)
        raise KeyError
    assert capsys.readouterr().err == "a line\n"


def test_bars_are_drawn_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with hub.barred():
        for _ in tqdm(range(3), desc="bar"):
            pass
    assert "bar: 100%" in capsys.readouterr().err
