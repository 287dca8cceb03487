"""A folder with a small modelling file of its own, which transformers runs with ``trust_remote_code=True``.

The file subclasses the network's class of transformers and puts peftc's low-rank modules into it; what they compute is
copied out of peftc, so the folder loads where peftc is not installed. `config.json` says which modules, at which rank.
"""

import inspect
from pathlib import Path
from typing import Any

from peftc.errors import ExportError
from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.formats.foreign import refuse_other_library
from peftc.formats.hf import SHARD, read_otherwise
from peftc.models.model import Model
from peftc.models.weights import pieces_of
from peftc.nn import lowrank, shared, surgery
from peftc.store import artifact

CODE = "modeling_factored.py"
LOCK = "this folder holds low-rank factors: load it with AutoModel and trust_remote_code=True"
SHARING = ["import threading", "import weakref", "from dataclasses import dataclass"]
HEAD = '''\
"""{architecture} with low-rank factors in the place of some weights.

Written by peftc; it needs transformers and torch. Load it with
`transformers.{auto}.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

{imports}

LOCK = "{lock}"


def other_version(config):
    """Return the refusal of a transformers whose network has other modules."""
    there = config.factored["transformers"]
    return RuntimeError(
        f"this folder was written with transformers {{there}}, which calls the modules of this network otherwise "
        f"than transformers {{transformers.__version__}}: pip install transformers=={{there}}"
    )
'''
FACTOR = '''\
def factor(network, modules):
    """Replace modules by low-rank ones: name -> form and rank."""
    if not modules.keys() <= dict(network.named_modules()).keys():
        raise other_version(network.config)
    for name, edit in modules.items():
        old = network.get_submodule(name)
        replace(network, old, KINDS[edit["form"]].like(old, edit["form"], edit["rank"]))
'''
SHARE = """\
    groups = {}  # `shares` names the first of several modules with one down factor
    for name, edit in modules.items():
        if "shares" in edit:
            groups.setdefault(edit["shares"], []).append(network.get_submodule(name))
    for members in groups.values():
        down = SharedDown(members[0].in_features, members[0].rank, len(members))
        for member in members:
            member.down = down
"""
CLASSES = '''\
class Factored{base_config}(transformers.{base_config}):
    """The configuration of the dense network; `factored` says which modules are low-rank, and what they share."""

    model_type = "{model_type}"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Leave out what stops classes that know no factors."""
        kept = {{key: value for key, value in config_dict.items() if key != "transformers_weights"}}
        return super().from_dict(kept, **kwargs)

    def to_dict(self):
        """Stop classes that know no factors: they would fill them with random numbers."""
        return {{**super().to_dict(), "transformers_weights": LOCK}}

    def to_diff_dict(self):
        """Say so in config.json too."""
        return {{**super().to_diff_dict(), "transformers_weights": LOCK}}


class Factored{architecture}(transformers.{architecture}):
    """The dense network, some of its modules replaced by low-rank ones."""

    config_class = Factored{base_config}
    is_factored = False

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        factor(self, config.factored["modules"])
        self.is_factored = True
        self._tied_weights_keys = dict(config.factored["tied"])
        self.all_tied_weights_keys = dict(config.factored["tied"])
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load the weights, and refuse to fill what they lack with random numbers."""
        network, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise other_version(network.config)
        return (network, info) if output_loading_info else network

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        """Return alias -> name of each parameter that is also called otherwise."""
        if not self.is_factored:
            return super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return dict(self.config.factored["tied"])

    def tie_weights(self, missing_keys=None, **kwargs):
        """Make each alias the same parameter as its name."""
        if not self.is_factored:
            return super().tie_weights(missing_keys=missing_keys, **kwargs)
        for alias, name in self.config.factored["tied"].items():
            path, _, leaf = alias.rpartition(".")
            setattr(self.get_submodule(path), leaf, self.get_parameter(name))
        if missing_keys is not None:
            missing_keys.difference_update(self.config.factored["tied"])
'''
LIBRARY = "transformers"
TAGS = ("custom_code",)
USE = """\
import transformers

network = transformers.AutoModel.from_pretrained("{repo}", trust_remote_code=True)
"""


def hf_code(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json``, weights as they are, and the modelling file, of a model of transformers with factors."""
    refuse_other_library(model, "transformers", "hf-code")
    import transformers

    edits = dict(model.manifest.modules) if model.manifest else {}
    if not edits:
        raise ExportError(f"`{model.name}` has no factors", why="it needs no code of its own", hint="use `--format hf`")
    (folder / CODE).write_text(code(model, edits), encoding="utf-8")
    name, stem, config_class = f"Factored{model.architecture}", Path(CODE).stem, type(model.module.config).__name__
    tied = {alias: names[0] for names in surgery.stored_names(model.module).values() for alias in names[1:]}
    classes = {each: f"{stem}.{name}" for each in auto_classes(model.architecture)}
    config = {
        **model.config,
        "model_type": f"factored_{model.module.config.model_type}",
        "architectures": [name],
        "transformers_weights": LOCK,
        "factored": {"modules": edits, "tied": tied, "transformers": transformers.__version__},
        "auto_map": {"AutoConfig": f"{stem}.Factored{config_class}", **classes},
    }
    artifact.write_json(folder / "config.json", config)
    artifact.write_weights(folder, pieces_of(model), None, SHARD)
    written = exported.plain(model, folder, trusted=True)
    written.expected = exported.factors(model)
    written.notes += read_otherwise(model.config)
    written.notes.append(f"it runs `{CODE}` of the folder: whoever loads it has to pass `trust_remote_code=True`")
    written.notes.append("a transformers that calls the modules otherwise refuses the folder, and says which wrote it")
    return written


def auto_classes(architecture: str) -> list[str]:
    """Return the classes of transformers by which a network of this class is found, `AutoModel` first."""
    from transformers.models.auto import modeling_auto

    found = ["AutoModel"]
    for name, auto in sorted(vars(modeling_auto).items()):
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModelFor") else None
        classes = mapping._model_mapping.values() if mapping is not None else ()
        if any(architecture in (each if isinstance(each, tuple) else (each,)) for each in classes):
            found.append(name)
    return found


def code(model: Model, edits: dict[str, Any]) -> str:
    """Return the modelling file: the modules of peftc that the forms need, and two classes of transformers."""
    forms = {edit["form"] for edit in edits.values()}
    imports = ["from typing import Any", "", "import transformers", "from torch import Tensor, nn"]
    kinds = {form: lowrank.KINDS[form] for form in lowrank.FORMS if form in forms}
    parts: list[Any] = []
    factor = FACTOR
    if any("shares" in edit for edit in edits.values()):
        factor = FACTOR + SHARE
        imports = [*SHARING, *imports[:2], "import torch", *imports[2:]]
        parts += [shared._Product, shared.SharedDown, shared._same]
    if "embedding" in forms:
        imports.append("from torch.nn import functional as F")
    names = {
        "architecture": model.architecture,
        "auto": auto_classes(model.architecture)[-1],
        "lock": LOCK,
        "imports": "\n".join(["from __future__ import annotations", "", *imports]),
        "base_config": type(model.module.config).__name__,
        "model_type": f"factored_{model.module.config.model_type}",
    }
    table = f"KINDS = {{{', '.join(f'{form!r}: {kind.__name__}' for form, kind in kinds.items())}}}\n"
    sources = [inspect.getsource(part) for part in (*parts, *dict.fromkeys(kinds.values()))]
    head, replace, classes = HEAD.format(**names), inspect.getsource(surgery.replace), CLASSES.format(**names)
    return "\n\n".join([head, *sources, table, replace, factor, classes])
