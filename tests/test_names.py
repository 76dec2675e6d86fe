"""Check that the modules at the root of the project hide no module of an installed package."""

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {path.stem for path in ROOT.glob("*.py")} | {"mixgpt"}


def imported_by(package):
    """Return the top-level names that the files of an installed package import, anywhere in them."""
    names = set()
    for file in Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def test_no_module_at_the_root_has_the_name_of_an_installed_one_or_of_the_standard_library():
    assert {"opt", "quant", "mixgpt"} <= OURS
    assert not OURS & (set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names)


def test_the_package_evaluate_is_imported_at_the_root_of_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    evaluate = pytest.importorskip("evaluate")  # comes with lm-eval, whose tasks import it
    ours = ROOT, ROOT / "evaluate"  # and not all below: the environment may lie there
    assert callable(evaluate.load) and Path(evaluate.__file__).parent not in ours


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its strings
def test_tasks_of_lm_eval_import_none_of_our_modules_by_mistake():
    pytest.importorskip("lm_eval")
    names = imported_by("lm_eval")
    assert {"evaluate", "datasets", "transformers"} <= names
    assert not OURS & names
