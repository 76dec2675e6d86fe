"""Model families: where the decoder layers of a model are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A command line, and where the models that it prunes have their decoder layers.

    The model's own `forward` runs the modules before and after the layers.
    """

    script: str  # the command line of this family
    layers: str  # the list of decoder layers, as a dotted path
    model_type: str | None = None  # of the configurations that it takes (default: any)

    def layers_of(self, model):
        return model.get_submodule(self.layers)

    def path(self, index, name):
        """Return the full name of the linear `name` of layer number `index`."""
        return f"{self.layers}.{index}.{name}"

    def fits(self, model):
        """Return whether a model has its decoder layers where this family has them."""
        takes = self.model_type in (None, model.config.model_type)
        return takes and self.layers in (path for path, _ in model.named_modules())

    def rest_of(self, model):
        """Return the modules that hold what is not in the layers, {dotted path: module}."""
        names = self.layers.split(".")
        above = [".".join(names[:count]) for count in range(len(names))]  # "", "model", "model.decoder"
        return {path: module for path, module in model.named_modules()
                if path.rpartition(".")[0] in above and path not in (*above, self.layers)}


OPT = Family("opt.py", "model.decoder.layers")
BLOOM = Family("bloom.py", "transformer.h")
BAICHUAN = Family("baichuan.py", "model.layers", model_type="baichuan")
LLAMA = Family("llama.py", "model.layers")
FAMILIES = (OPT, BLOOM, BAICHUAN, LLAMA)


def family_of(model):
    """Return the first of FAMILIES that a model fits, or None."""
    return next((family for family in FAMILIES if family.fits(model)), None)
