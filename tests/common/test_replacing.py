"""Check that files are written whole or not at all."""

import pytest

from mixgpt.common.files import replacing


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
