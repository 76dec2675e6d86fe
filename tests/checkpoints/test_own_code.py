"""Check which of a model's own Python files go with it."""

import pytest

from mixgpt.checkpoints import own_code


@pytest.fixture
def folder(tmp_path):
    """Give a folder of code that must not run, with imports among its files."""
    (tmp_path / "inside").mkdir()
    poison = "raise RuntimeError('code of the checkpoint was run')\n"
    for name, imports in {"modeling": "from .settings import A\n", "settings": "from .parts import B\n", "parts": "",
                          "broken": "from .nothing import C\n", "other": ""}.items():
        (tmp_path / "inside" / f"{name}.py").write_text(imports + poison)
    (tmp_path / "outside.py").write_text(poison)
    return tmp_path / "inside"


@pytest.mark.parametrize("reference, files, missing", [
    ("modeling.Model", {"modeling.py", "settings.py", "parts.py"}, set()),
    (["other.Tokenizer", None], {"other.py"}, set()),
    ("broken.Model", {"broken.py"}, {"nothing.py"}),
    ("absent.Model", set(), {"absent.py"}),
    ("a/repository--modeling.Model", set(), set()),
    ("../outside.Model", set(), {"../outside.py"}),
    ("Model", set(), {".py"})])
def test_the_files_of_a_class_are_found_with_what_they_import(reference, files, missing, folder):
    assert own_code.files_of(folder, {"AutoModelForCausalLM": reference}) == (files, missing)
