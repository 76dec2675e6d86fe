"""Draw the graph of imports: each module belongs to a layer and may import only from lower layers, or its own."""

import ast
import importlib.metadata
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

LAYERS = [  # from the top
    ("opt", "llama", "bloom", "baichuan", "generate", "results"),
    ("mixgpt.app",),
    ("mixgpt.evaluation",),
    ("mixgpt.allocation", "mixgpt.checkpoints"),
    ("mixgpt.pruning",),
    ("sparsegpt", "datautils"),
    ("quant", "modelutils"),
    ("mixgpt.kernels", "mixgpt.modeling", "mixgpt.common"),
]
HEIGHT = {package: -number for number, layer in enumerate(LAYERS) for package in layer}


def package_of(module):
    """Return the package of a module, None if it is in no layer; a file at the root is a package of its own."""
    package = ".".join(module.split(".")[:2])
    return package if package in HEIGHT and module.count(".") <= 2 else None


def imports_of(source, modules):
    """Return those of `modules` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def graph_of(root):
    """Return {module: modules that it imports} of all files of the product below a folder."""
    sources = {path: path.read_text() for path in (*root.glob("*.py"), *root.glob("mixgpt/**/*.py"))}
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in sources}
    modules = set(names.values())
    return {names[path]: imports_of(source, modules) for path, source in sources.items()}


def faults_of(graph):
    """Return a line for everything in a graph that is not allowed."""
    outside = [module for module in sorted(graph) if module != "mixgpt" and not package_of(module)]
    faults = [f"{module} belongs to no layer" for module in outside]
    packages = {}
    for module, imported in sorted(graph.items()):
        for other in sorted(imported):
            package, target = package_of(module), package_of(other)
            if package and target and package != target:
                packages.setdefault(package, set()).add(target)
                if HEIGHT[target] > HEIGHT[package]:
                    faults.append(f"{module} imports {other}, which is in a higher layer")
    for level in (graph, packages):
        try:
            TopologicalSorter(level).prepare()
        except CycleError as error:
            faults.append(f"a circle: {' <- '.join(error.args[1])}")
    return faults


def test_every_module_belongs_to_a_layer_and_imports_only_go_down():
    graph = graph_of(ROOT)
    assert len(graph) > 50 and sum(map(len, graph.values())) > 150
    assert faults_of(graph) == []


@pytest.mark.parametrize("file, line, fault", [
    ("mixgpt/kernels/selection.py", "import sparsegpt",
     "mixgpt.kernels.selection imports sparsegpt, which is in a higher layer"),
    ("mixgpt/kernels/selection.py", "def f():\n    from quant import Grid",
     "mixgpt.kernels.selection imports quant, which is in a higher layer"),
    ("mixgpt/pruning/admm.py", "from mixgpt.pruning.layerwise import prune_sparsegpt", "a circle: "),
    ("utils.py", "", "utils belongs to no layer"),
])
def test_what_is_not_allowed_is_found(file, line, fault, tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("mixgpt/**/*.py"), ROOT / file):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() if path.exists() else "")
    with (tmp_path / file).open("a") as changed:
        changed.write(f"\n{line}\n")
    faults = faults_of(graph_of(tmp_path))
    assert any(found.startswith(fault) for found in faults), faults


def test_what_pip_installs_is_what_the_package_imports():
    graph = graph_of(ROOT)
    needed = {name for name in graph if name.partition(".")[0] == "mixgpt"}
    while further := set().union(*(graph[name] for name in needed)) - needed:
        needed |= further
    at_the_root = {name for name in needed if "." not in name} - {"mixgpt"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(at_the_root) == settings["py-modules"]


def test_no_module_at_the_root_has_the_name_of_an_installed_one_or_of_the_standard_library():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"mixgpt"}
    assert not ours & (set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names)
