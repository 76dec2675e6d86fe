"""Check that test text is not trained on."""

import sysconfig

import small_models
from small_models import documents


def test_train_and_test_text_are_disjoint_and_further_packages_move_no_file_to_the_other_part(tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": tmp_path, "purelib": packages, "platlib": packages})
    monkeypatch.setattr(small_models, "builtin_rows", lambda part: ([f"The {part} text of the manual."], {}))
    for number in range(20):
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    before = documents(10**6, 10**6)
    both = before["train"] + before["test"]
    assert len(both) == len(set(both)) == 22 and len(before["train"]) > 3 * len(before["test"]) > 0
    for number in range(40):
        (packages / f"new{number}.py").write_text(f"z = {number}\n")
        (tmp_path / f"copy{number}.py").write_text("x = 3\n")
    after = documents(10**6, 10**6)
    assert all(set(before[part]) < set(after[part]) for part in before)
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 40
