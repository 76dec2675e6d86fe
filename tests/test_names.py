"""Check that the modules at the root of the project hide no module of an installed package."""

import importlib.metadata
import sys

from conftest import ROOT

OURS = {path.stem for path in ROOT.glob("*.py")} | {"mixgpt"}


def test_no_module_at_the_root_has_the_name_of_an_installed_one_or_of_the_standard_library():
    assert {"opt", "quant", "mixgpt"} <= OURS
    assert not OURS & (set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names)
