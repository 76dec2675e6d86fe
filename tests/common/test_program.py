"""Check what tells which version of this program wrote a file."""

import subprocess

from mixgpt.common import program


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def test_a_checkout_tells_its_commit_and_whether_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "__file__", str(tmp_path / "mixgpt" / "common" / "program.py"))
    assert program.commit() is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "--message", "a")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert program.commit() == head and len(head) == 40
    (tmp_path / "a.py").write_text("2\n")
    assert program.commit() == f"{head}-dirty"
