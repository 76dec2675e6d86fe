"""Model families: where the decoder layers of a model are."""

from dataclasses import dataclass

from mixgpt.common.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where models have their decoder layers. Their own `forward` runs the modules before and after the layers."""

    script: str  # the command line that documents this family; each takes all of them
    layers: str  # the list of decoder layers, as a dotted path

    def layers_of(self, model):
        return model.get_submodule(self.layers)

    def path(self, index, name):
        """Return the full name of the linear `name` of layer number `index`."""
        return f"{self.layers}.{index}.{name}"

    def rest_of(self, model):
        """Return the modules that hold what is not in the layers, {dotted path: module}."""
        names = self.layers.split(".")
        above = [".".join(names[:count]) for count in range(len(names))]  # "", "model", "model.decoder"
        return {path: module for path, module in model.named_modules()
                if path.rpartition(".")[0] in above and path not in (*above, self.layers)}


OPT = Family("opt.py", "model.decoder.layers")
BLOOM = Family("bloom.py", "transformer.h")
BAICHUAN = Family("baichuan.py", "model.layers")
LLAMA = Family("llama.py", "model.layers")
GPT_NEOX = Family("llama.py", "gpt_neox.layers")
MPT = Family("llama.py", "transformer.blocks")
FAMILIES = [OPT, BLOOM, LLAMA, GPT_NEOX, MPT]


def family_of(model):
    """Return the first of FAMILIES whose layers a model has. Raises InputError if there is none."""
    paths = {path for path, _ in model.named_modules()}
    for family in FAMILIES:
        if family.layers in paths:
            return family
    raise InputError(f"model {model.config.name_or_path}: the layers of a {type(model).__name__} are not at "
                     f"{' or '.join(family.layers for family in FAMILIES)}")
