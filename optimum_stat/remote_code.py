"""`modeling_stat.py`: lets people without this package load a pruned model with `trust_remote_code=True`.

The file is generated from our own sources, families, slicing and structure one after the other, so it replays the record
with the same code as the package does.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

MODULE = "modeling_stat"
PARTS = ("families.py", "slicing.py", "structure.py")
HEADER = '''"""Loads a model pruned by optimum-stat with transformers alone (generated; see https://pypi.org/project/optimum-stat).

from_pretrained(..., trust_remote_code=True) uses this file; with `import optimum_stat` it is not needed.
"""

from __future__ import annotations

import transformers

'''
CLASS = '''

class {name}(transformers.{name}):
    """Cut to the sizes in config.json before the weights are read."""

    def post_init(self):
        replay(self)
        super().post_init()
'''


def write(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the file into `folder`; returns config.json's `auto_map`."""
    auto_map = {auto: f"{MODULE}.{name}" for auto, name in _auto_classes(model).items()}
    names = sorted({reference.partition(".")[2] for reference in auto_map.values()})
    text = HEADER + "".join(map(_source, PARTS)) + "".join(CLASS.format(name=name) for name in names)
    (folder / f"{MODULE}.py").write_text(text)
    return auto_map


def _auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """Auto class -> the model class it makes from this model's config."""
    found = {}
    for auto, value in vars(modeling_auto).items():
        mapping = getattr(value, "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and type(model.config) in mapping:
            chosen = mapping[type(model.config)]
            found[auto] = (chosen[0] if isinstance(chosen, (tuple, list)) else chosen).__name__
    return found


def _source(name: str) -> str:
    """One of our source files without what only makes sense inside the package."""
    text = (resources.files("optimum_stat") / name).read_text()
    text = re.sub(r"^from __future__ import annotations\n", "", text, flags=re.M)
    text = re.sub(r"^from \.[\w.]* import (\([^)]*\)|.*)\n", "", text, flags=re.M)
    return re.sub(r'\A""".*?"""\n', f"# ---- {name}\n", text, flags=re.S)
