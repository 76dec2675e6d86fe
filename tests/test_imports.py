"""Draw the graph of imports: each module belongs to a layer and may import only from lower layers, or its own."""

import ast
from graphlib import CycleError, TopologicalSorter

from conftest import ROOT

LAYERS = [  # from the top
    ("opt", "llama", "bloom", "baichuan", "generate", "results", "sparsegpt", "quant", "datautils", "modelutils",
     "mixgpt.__main__"),
    ("mixgpt.app",),
    ("mixgpt.evaluation", "mixgpt.integrations"),
    ("mixgpt.allocation", "mixgpt.checkpoints"),
    ("mixgpt.pruning",),
    ("mixgpt.sparsegpt", "mixgpt.datautils"),
    ("mixgpt.quant",),
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
