"""Check that the modules at the root of the project hide no module of an installed package."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {path.stem for path in ROOT.glob("*.py")} | {"mixgpt"}


def test_no_module_at_the_root_has_the_name_of_an_installed_one_or_of_the_standard_library():
    assert {"opt", "quant", "mixgpt"} <= OURS
    assert not OURS & (set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names)


def test_the_package_evaluate_is_imported_at_the_root_of_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    evaluate = pytest.importorskip("evaluate")  # comes with lm-eval, whose tasks import it
    ours = ROOT, ROOT / "evaluate"  # and not all below: the environment may lie there
    assert callable(evaluate.load) and Path(evaluate.__file__).parent not in ours
