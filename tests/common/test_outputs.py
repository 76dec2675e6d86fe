"""Check that files are checked before the work: whether they exist, can be written, and are each other's."""

import os
import re

import pytest

from mixgpt.common.errors import InputError
from mixgpt.common.outputs import check, write


def test_text_is_written_with_the_folders_above_it_or_refused_in_one_line(tmp_path):
    write("--record", tmp_path / "b" / "c" / "d.json", "{}")
    assert (tmp_path / "b" / "c" / "d.json").read_text() == "{}"
    with pytest.raises(InputError, match=r"--record .*d.json/e: cannot be written \(.*\); name another file"):
        write("--record", tmp_path / "b" / "c" / "d.json" / "e", "{}")
    assert [path.name for path in (tmp_path / "b" / "c").iterdir()] == ["d.json"]


def test_a_path_is_tried_where_the_nearest_folder_is_and_nothing_stays_behind(tmp_path):
    (tmp_path / "file").touch()
    check({"--csv": tmp_path / "new" / "folder" / "a.csv"}, overwrite=False)
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "file" / "a.csv", tmp_path / "pipe", "/dev/null", tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match=f"--csv {bad}: "):
            check({"--csv": bad}, overwrite=True)
    with pytest.raises(InputError, match="--plot a.txt: must end in .png, .pdf, .svg"):
        check({"--plot": "a.txt"}, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}


def test_a_file_is_replaced_only_with_overwrite_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("old")
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "a.json")
    for path in (tmp_path / "latest", tmp_path / "runs" / "a.json"):
        with pytest.raises(InputError, match=re.escape(f"--record {path}: exists; give --overwrite to replace it")):
            check({"--record": path}, overwrite=False)
    check({"--record": tmp_path / "latest"}, overwrite=True)
    write("--record", tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "runs" / "a.json").read_text() == "new"


def test_two_outputs_never_share_a_file_and_the_saved_model_has_its_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "link").symlink_to("saved")
    check({"--record": "saved.json", "--plot": "b/a.png"}, False, "saved")
    with pytest.raises(InputError, match=re.escape("--csv b/../a.png: is the file of --plot; name another file")):
        check({"--plot": "a.png", "--csv": "b/../a.png"}, False)
    for place in ("saved/new.json", "link/new.json"):
        with pytest.raises(InputError, match=f"--record {place}: lies in the folder of --save; name a file elsewhere"):
            check({"--record": place}, False, "saved")
