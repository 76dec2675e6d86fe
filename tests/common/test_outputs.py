"""Check that files are written whole or not at all, options checked before the work, and what tells who wrote them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from mixgpt.app.settings import Settings
from mixgpt.common import program
from mixgpt.common.errors import InputError
from mixgpt.common.files import cache_folder, check_outputs, replacing, write_output


def test_a_file_is_replaced_at_the_end_of_the_block_and_stays_as_it_was_after_an_error(tmp_path):
    file = tmp_path / "a"
    with replacing(file) as partial:
        partial.write_text("first")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), replacing(file) as partial:
        partial.write_text("sec")
        raise KeyboardInterrupt
    with pytest.raises(OSError), replacing(file):
        pass  # nothing was written
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_a_path_is_tried_where_the_nearest_folder_is_and_nothing_stays_behind(tmp_path):
    (tmp_path / "file").touch()
    check_outputs({"--csv": tmp_path / "new" / "folder" / "a.csv"}, overwrite=False)
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "file" / "a.csv", tmp_path / "pipe", "/dev/null", tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match=f"--csv {bad}: "):
            check_outputs({"--csv": bad}, overwrite=True)
    for bad, message in [("a.txt", "must end in .png, .pdf, .svg"), ("./file", "is the file of --csv, too; name an")]:
        with pytest.raises(InputError, match=f"--plot {bad}: {message}"):
            check_outputs({"--csv": Path("file"), "--plot": bad}, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}


def test_a_file_is_replaced_only_with_overwrite_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("old")
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "a.json")
    for path in (tmp_path / "latest", tmp_path / "runs" / "a.json"):
        with pytest.raises(InputError, match=re.escape(f"--record {path}: exists; give --overwrite to replace it")):
            check_outputs({"--record": path}, overwrite=False)
    check_outputs({"--record": tmp_path / "latest"}, overwrite=True)
    write_output("--record", tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "runs" / "a.json").read_text() == "new"


def test_the_saved_model_has_its_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "link").symlink_to("saved")
    Settings("a/model", "builtin", save="saved", record="saved.json").check_paths()
    for place in ("saved/new.json", "link/new.json"):
        with pytest.raises(InputError, match=f"--save saved: holds {place}, which this run uses; name another"):
            Settings("a/model", "builtin", save="saved", record=place).check_paths()


def test_without_a_home_the_line_names_the_variable_of_the_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("~nobody-of-this-name").expanduser())
    with pytest.raises(InputError, match="XDG_CACHE_HOME: must name a folder for the cache: Could not determine home"):
        cache_folder()


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
