"""Families of models: where the parts of a model lie."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where the parts of a model lie, as dotted paths; a path that leads to None is skipped."""

    script: str  # the command line of this family
    layers: str  # the list of decoder layers
    before: tuple[str, ...]  # modules that run before the first layer
    after: tuple[str, ...]  # modules that turn the last layer's output into logits, in order

    def layers_of(self, model):
        return model.get_submodule(self.layers)

    def path(self, index, name):
        """Return the name in the model of the linear `name` of layer number `index`."""
        return f"{self.layers}.{index}.{name}"

    def before_of(self, model):
        return _present(model, self.before)

    def after_of(self, model):
        return _present(model, self.after)


def _present(model, paths):
    modules = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name)
        if module is not None:
            modules.append(module)
    return modules
