"""Check that files are written whole or not at all, and that paths are tried before the work."""

import pytest

from mixgpt.common.errors import InputError
from mixgpt.common.files import check_writable, replacing, write


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


def test_text_is_written_with_the_folders_above_it_or_refused_in_one_line(tmp_path):
    write("--record", tmp_path / "b" / "c" / "d.json", "text")
    assert (tmp_path / "b" / "c" / "d.json").read_text() == "text"
    with pytest.raises(InputError, match=r"--record .*d.json/e: cannot be written \(.*\); name another file"):
        write("--record", tmp_path / "b" / "c" / "d.json" / "e", "text")
    assert [path.name for path in (tmp_path / "b" / "c").iterdir()] == ["d.json"]


def test_a_path_is_tried_where_the_nearest_folder_is_and_nothing_stays_behind(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    check_writable("--csv", tmp_path / "new" / "folder" / "a.csv")
    for bad in (tmp_path, tmp_path / "file" / "a.csv", tmp_path / "nowhere" / "a.csv"):
        with pytest.raises(InputError, match=f"--csv {bad}: "):
            check_writable("--csv", bad)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "nowhere"}


def test_a_file_may_hold_the_name_of_any_file(tmp_path):
    write("--csv", tmp_path / "runs.csv", "é \udcff\n")  # as Python names a file whose name is not UTF-8
    assert (tmp_path / "runs.csv").read_bytes() == "é ".encode() + b"\xff\n"
