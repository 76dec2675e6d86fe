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


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_is_an_answer_and_is_asked_for_once(monkeypatch, status):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.reachable() and hub.reachable()
    assert len(asked) == 1
    server.shutdown()
    server.server_close()


def test_no_answer_and_offline_mode_are_recognised(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.reachable()
    hub.reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked in offline mode"))
    assert not hub.reachable()


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
