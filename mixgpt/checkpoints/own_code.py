"""The Python files that a model brings, named by `auto_map`: copied with it so that others can load it, never run."""

import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from mixgpt.modeling.family import family_of


def keep(folder, model, tokenizer):
    """Copy the code of a model and its tokenizer into the folder that they are saved to, before they are saved.

    An `auto_map` whose files are not all there would make the folder useless to others: it is dropped, with a warning
    on stderr if the model has no class in transformers. What lies on the hub (REPOSITORY--MODULE.CLASS) stays there.
    """
    source, dropped = Path(model.config.name_or_path), set()
    for owner in (vars(model.config), tokenizer.init_kwargs):
        files, missing = files_of(source, owner.get("auto_map") or {})
        if missing:
            del owner["auto_map"]
        for file in () if missing else files:
            shutil.copyfile(source / file, folder / file)
        dropped |= missing
    if dropped and not type(model).__module__.startswith("transformers."):
        print(f"warning  {folder}: its configuration does not name code any more, as {', '.join(sorted(dropped))} "
              f"cannot be read in {source}: {family_of(model).script} and generate.py load it, "
              "from_pretrained alone does not", file=sys.stderr, flush=True)


def files_of(folder, auto_map):
    """Return the names of the files in a folder that an `auto_map` needs, and of those that cannot be read there."""
    references = [reference for value in auto_map.values()
                  for reference in (value if isinstance(value, list | tuple) else [value]) if reference]
    todo = [reference.rpartition(".")[0] for reference in references if "--" not in reference]
    files, missing = set(), set()
    while todo:
        module = todo.pop()
        if f"{module}.py" in files | missing:
            continue
        try:
            if not module.isidentifier():  # a path, which could lead out of the folder
                raise OSError
            todo += get_relative_imports(folder / f"{module}.py")
            files.add(f"{module}.py")
        except (OSError, ValueError):
            missing.add(f"{module}.py")
    return files, missing
