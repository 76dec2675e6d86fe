"""Check which files an option may replace, where it may write, and that paths are tried before the work."""

import io
import os
import re
import socket

import pytest
from matplotlib.figure import Figure

from mixgpt.app import plots
from mixgpt.common.errors import InputError
from mixgpt.common.outputs import PICTURE, RECORD, TABLE, check_places, check_writable, write
from mixgpt.pruning.targets import Target

OURS = '{\n "settings": {\n  "model": "facebook/opt-125m"}}\n'


def test_text_is_written_with_the_folders_above_it_or_refused_in_one_line(tmp_path):
    write("--record", tmp_path / "b" / "c" / "d.json", OURS, RECORD)
    assert (tmp_path / "b" / "c" / "d.json").read_text() == OURS
    with pytest.raises(InputError, match=r"--record .*d.json/e: cannot be written \(.*\); name another file"):
        write("--record", tmp_path / "b" / "c" / "d.json" / "e", OURS, RECORD)
    assert [path.name for path in (tmp_path / "b" / "c").iterdir()] == ["d.json"]


def test_a_path_is_tried_where_the_nearest_folder_is_and_nothing_stays_behind(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    check_writable("--csv", tmp_path / "new" / "folder" / "a.csv", TABLE)
    for bad in (tmp_path, tmp_path / "file" / "a.csv", tmp_path / "nowhere" / "a.csv", tmp_path / ("a" * 250)):
        with pytest.raises(InputError, match=f"--csv {bad}: "):
            check_writable("--csv", bad, TABLE)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "nowhere"}


def test_only_a_file_of_its_kind_is_replaced_even_if_it_came_during_the_work(tmp_path):
    file = tmp_path / "a.json"
    write("--record", file, OURS, RECORD)
    write("--record", file, OURS.replace("125m", "350m"), RECORD)
    assert "350m" in file.read_text()
    for other in ("", "{}", '{"model_type": "opt"}', f"text before {OURS}", "model,method,sparsity,wbits,seed\n"):
        file.write_text(other)
        for check in (check_writable, lambda *asked: write(*asked[:2], OURS, asked[2])):
            with pytest.raises(InputError, match=f"{file}: is not a file of --record, and not replaced; name"):
                check("--record", file, RECORD)
        assert file.read_text() == other and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("suffix", PICTURE.suffixes)
def test_a_picture_is_replaced_if_it_carries_our_mark(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    write("--plot", file, plots.draw({(0, "fc1"): Target(0.5)}, suffix=suffix), PICTURE)
    check_writable("--plot", file, PICTURE)
    foreign = io.BytesIO()
    Figure().savefig(foreign, format=suffix[1:])
    for content in (foreign.getvalue(), b"MixGPT", b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not a file of --plot, and not replaced"):
            check_writable("--plot", file, PICTURE)


def test_a_link_stays_a_link_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "a.json")
    with pytest.raises(InputError, match="latest: is a link to a file that does not exist; name another file"):
        check_writable("--record", tmp_path / "latest", RECORD)
    (tmp_path / "runs" / "a.json").write_text(OURS)
    write("--record", tmp_path / "latest", OURS.replace("125m", "350m"), RECORD)
    assert (tmp_path / "latest").is_symlink() and "350m" in (tmp_path / "runs" / "a.json").read_text()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="circle: cannot be written"):
        check_writable("--record", tmp_path / "circle", RECORD)


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in {tmp_path / "pipe": "pipe", tmp_path / "link": "pipe", tmp_path / "socket": "socket",
                           "/dev/null": "device", "/dev/zero": "device", tmp_path: "folder"}.items():
            for check in (check_writable, lambda *asked: write(*asked[:2], OURS, asked[2])):
                with pytest.raises(InputError, match=re.escape(f"--csv {path}: is a {kind}; name a file")):
                    check("--csv", path, TABLE)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "socket"}


@pytest.mark.parametrize("written, message", [
    ({"--record": "a.json", "--plot": "b/../a.json"}, "--plot b/../a.json: is the same file as --record a.json"),
    ({"--record": "model/new.json"}, "--record model/new.json: lies in model model; name a file elsewhere"),
    ({"--record": "link/new.json"}, "--record link/new.json: lies in model model"),
    ({"--record": "a", "--plot": "a/b.png"}, "--plot a/b.png: lies in --record a"),
    ({"--plot": "a/b.png", "--record": "a"}, "--record a: is to be a file, and the folder of --plot a/b.png"),
    ({"--record": "saved"}, "--record saved: is the same file as --save saved"),
    ({"--record": "saved.json", "--plot": "models/a.png"}, None)])
def test_places_that_others_write_to_are_refused(written, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    if message is None:
        check_places(written, [("model", "model"), ("--save", "saved")])
        return
    with pytest.raises(InputError, match=re.escape(message)):
        check_places(written, [("model", "model"), ("--save", "saved")])
