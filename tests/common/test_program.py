"""Check what tells which version of this program wrote a file."""

import subprocess

import pytest

from mixgpt.common import program


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Let the program run from another folder, which may become a checkout; give it."""
    monkeypatch.setattr(program, "__file__", str(tmp_path / "mixgpt" / "common" / "program.py"))
    return tmp_path


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def test_a_checkout_tells_its_commit_and_whether_files_were_changed(checkout):
    assert program.commit() is None
    git(checkout, "init", "--quiet")
    (checkout / "a.py").write_text("1\n")
    git(checkout, "add", "a.py")
    git(checkout, "commit", "--quiet", "--message", "a")
    git(checkout, "tag", "v1")
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert program.commit() == head and len(head) == 40
    (checkout / "a.py").write_text("2\n")
    assert program.commit() == f"{head}-dirty"
