"""Model families: where the parts of a model are."""

import importlib
from dataclasses import dataclass

SCRIPTS = ("opt", "llama", "bloom", "baichuan")  # built in, each with its FAMILY


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are, as dotted paths; a path to None is skipped."""

    script: str  # the command line of this family
    classes: tuple[str, ...]  # model classes with this layout
    layers: str  # the list of decoder layers
    before: tuple[str, ...]  # modules that run before the first layer
    after: tuple[str, ...]  # modules that turn the last layer's output into logits, in order

    def layers_of(self, model):
        return model.get_submodule(self.layers)

    def path(self, index, name):
        """Return the full name of the linear `name` of layer number `index`."""
        return f"{self.layers}.{index}.{name}"

    def before_of(self, model):
        return _present(model, self.before)

    def after_of(self, model):
        return _present(model, self.after)


def family_of(name):
    """Return the built-in family of a model class, or None."""
    families = (importlib.import_module(script).FAMILY for script in SCRIPTS)  # they import this module
    return next((family for family in families if name in family.classes), None)


def _present(model, paths):
    modules = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name)
        if module is not None:
            modules.append(module)
    return modules
